package latency

import (
	"testing"
	"time"
)

func TestCounter(t *testing.T) {
	var c Counter
	for _, d := range []time.Duration{0, 20 * time.Microsecond, 21 * time.Microsecond, 3 * time.Second} {
		c.Observe(d)
	}
	s := c.Snapshot()
	if s.Buckets[0] != 2 || s.Buckets[1] != 1 || s.Buckets[len(Bounds)] != 1 || s.Count() != 4 || s.Sum != 3*time.Second+41*time.Microsecond {
		t.Errorf("%+v", s)
	}
}

func BenchmarkObserve(b *testing.B) {
	var c Counter
	for b.Loop() {
		begun := time.Now()
		c.Observe(time.Since(begun))
	}
}
