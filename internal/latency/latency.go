// Package latency counts how long requests take.
package latency

import (
	"sync/atomic"
	"time"
)

// Bounds are the upper bounds of the buckets. Above the last one there is another bucket.
var Bounds = [...]time.Duration{
	20 * time.Microsecond, 50 * time.Microsecond, 100 * time.Microsecond, 200 * time.Microsecond, 500 * time.Microsecond,
	time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 500 * time.Millisecond, 2 * time.Second,
}

// Counter counts durations. Its zero value is empty. It may be used by several goroutines at once.
type Counter struct {
	buckets [len(Bounds) + 1]atomic.Uint64
	sum     atomic.Int64 // nanoseconds
}

// Observe counts one.
func (c *Counter) Observe(d time.Duration) {
	i := 0
	for i < len(Bounds) && d > Bounds[i] {
		i++
	}
	c.buckets[i].Add(1)
	c.sum.Add(int64(d))
}

// Snapshot is what a Counter has counted.
type Snapshot struct {
	Buckets [len(Bounds) + 1]uint64 // each without those before it
	Sum     time.Duration
}

// Snapshot returns what has been counted. One that is just being counted may be in only one
// of the two fields.
func (c *Counter) Snapshot() (s Snapshot) {
	for i := range c.buckets {
		s.Buckets[i] = c.buckets[i].Load()
	}
	s.Sum = time.Duration(c.sum.Load())
	return s
}

// Count is how many were counted.
func (s Snapshot) Count() (n uint64) {
	for _, b := range s.Buckets {
		n += b
	}
	return n
}
