package net_test

import (
	"testing"
	"time"

	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/virtiotest"
	"golang.org/x/sys/unix"
)

// FuzzRequests has a driver send anything, ask for anything, and offer receive
// buffers of any shape. Every request comes back or the device needs a reset;
// the host gets no frame longer than there can be.
func FuzzRequests(f *testing.F) {
	f.Add([]byte{1, 20, 1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8})
	f.Add([]byte{4, 4, 4, 0, 2, 0, 3, 30, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1})
	f.Add([]byte{0, 200, 0, 100, 5, 90, 5, 80, 4, 10, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := newRig(t, 2, plain|offloads|net.FeatureMultiQueue)
		take := func(n int) []byte {
			n = min(n, len(in))
			p := in[:n]
			in = in[n:]
			return p
		}
		for n := uint64(0); len(in) > 1 && n < 24; n++ {
			head := take(2)
			op, size := head[0], uint32(head[1])
			at := r.data + n*32<<10
			switch op % 6 {
			case 0, 2: // room for frames
				if op&0x80 != 0 {
					size *= 120
				}
				r.add(int(op%6), nil, []virtiotest.Buffer{{GPA: at, Len: size}})
				continue
			case 1, 3, 4:
				p := take(int(size))
				check(t, r.mem.WriteAt(p, at))
				reads, writes := []virtiotest.Buffer{{GPA: at, Len: uint32(len(p))}}, []virtiotest.Buffer(nil)
				if op&0x80 != 0 {
					reads[0].Len += 20000
				}
				if op&0x40 == 0 {
					writes = []virtiotest.Buffer{{GPA: at + 24<<10, Len: uint32(op >> 3 & 3)}}
				}
				r.add(int(op%6), reads, writes)
			case 5:
				p := frame(int(size))
				copy(p, take(4))
				// A guest that gives no room has the wire fill up: that is dropped.
				_, _ = unix.Write(r.wire.peers[op>>7], p)
			}
		}
		deadline := time.After(10 * time.Second)
		for _, q := range []int{1, 3, 4} {
			for len(r.broken) == 0 {
				if _, ok := r.drivers[q].Used(); ok {
					continue
				}
				if r.drivers[q].InFlight() == 0 {
					break
				}
				select {
				case <-r.irq[q]:
				case err := <-r.broken:
					r.broken <- err
				case <-deadline:
					t.Fatalf("queue %d does not answer", q)
				}
			}
		}
		for pair := range 2 {
			for _, p := range r.wire.sent(t, pair) {
				if len(p) > net.HeaderBytes+net.MaxFrame || len(p) < net.HeaderBytes+14 {
					t.Errorf("a frame of %d bytes", len(p))
				}
			}
		}
		check(t, r.d.Pause(ctx(t)))
		check(t, r.d.Resume())
	})
}
