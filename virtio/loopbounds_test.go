package virtio_test

import (
	"testing"
	"testing/synctest"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// A server that keeps chains does not keep room for the longest one in each place.
func TestLoopForgetsLongChains(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		if features&virtio.FeatureIndirectDesc == 0 {
			return
		}
		synctest.Test(t, func(t *testing.T) {
			const size, long = 8, virtiotest.MaxIndirect
			putBack := false
			l := newLooped(t, features, virtio.Task{Servers: []virtio.Server{{Gather: func(chains []virtio.Chain, _ []uint32) (int, error) {
				switch n := len(chains); {
				case len(chains[n-1].Writable) < long:
					return virtio.Keep, nil
				case putBack:
					putBack = false
					return virtio.PutBack, nil
				default:
					return n, nil
				}
			}}}})
			l.driver.Indirect = true
			buffers := make([]virtiotest.Buffer, long)
			for i := range buffers {
				buffers[i] = virtiotest.Buffer{GPA: l.buffers(), Len: 4}
			}
			for i := range 2 * size {
				putBack = i >= size
				for range i % size {
					l.driver.Add(nil, buffers[:1])
				}
				l.driver.Add(nil, buffers)
				l.queue.Signal()
				synctest.Wait()
				select {
				case err := <-l.broken:
					t.Fatal(err)
				default:
				}
				if n := l.used(); n != i%size+1 {
					t.Fatalf("round %d: %d chains came back, want %d", i, n, i%size+1)
				}
			}
			check(t, l.l.Pause(t.Context()))
			if n := l.l.Segments(); n > 2*long+size {
				t.Errorf("room for %d segments is kept, the longest chain has %d", n, long)
			}
		})
	})
}
