package memory

import (
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// BenchmarkFault is what a thread waits that touches a missing page in the kernel, while
// another goroutine brings it, and a third one lands others all the time.
func BenchmarkFault(b *testing.B) {
	needFaults(b)
	const pages = 256 << 20 / mempage.Size
	m := newMemory(b, pages*mempage.Size, Anonymous)
	var p [2]int
	check(b, unix.Pipe2(p[:], 0))
	var buf [8]byte
	_, x := miss(b, m, func(_ int, p uint64) bool { return true })
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		c := make([]byte, 64*mempage.Size)
		for w := uint64(pages/64 - 1); w > pages/128; w-- {
			select {
			case <-stop:
				return
			default:
			}
			_ = x.Land(0, w*64, []uint64{^uint64(0)}, c)
		}
	}()
	n := uint64(0)
	for b.Loop() {
		_, _ = unix.Write(p[1], m.ram[n%(pages/2)*mempage.Size:][:8])
		_, _ = unix.Read(p[0], buf[:])
		n++
	}
	s := x.Stalls()
	b.ReportMetric(float64(s.Quantile(.5))/float64(time.Microsecond), "p50-us")
	b.ReportMetric(float64(s.Quantile(.99))/float64(time.Microsecond), "p99-us")
	b.ReportMetric(float64(s.Longest)/float64(time.Microsecond), "longest-us")
}
