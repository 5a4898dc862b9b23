package balloon_test

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/govmm/govmm/virtio/virtiotest"
)

// FuzzRequests feeds all queues and the configuration with anything. The
// device answers or needs a reset; it punches nothing but RAM, which real
// guest memory checks.
func FuzzRequests(f *testing.F) {
	f.Add([]byte{0, 8, 1, 0, 0, 0, 2, 0, 0, 0, 0x44, 4, 0, 0, 0, 0})
	f.Add([]byte{3, 4, 2, 0, 0, 0, 0x13, 0, 16, 0x14, 1, 200, 2, 20, 4, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2})
	f.Add([]byte{5, 12, 1, 0, 0, 0, 0x14, 0, 3})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := newRig(t, allOf)
		s := &sink{}
		r.b.SetHintSink(s)
		r.announce()
		take := func(n int) []byte {
			n = min(n, len(in))
			p := in[:n]
			in = in[n:]
			return p
		}
		sent := [queues]bool{}
		for n := 0; len(in) > 0 && n < 16; n++ {
			op := take(1)[0]
			queue := int(op & 0xf)
			switch {
			case queue >= queues:
				off := take(1)
				if len(off) == 1 {
					r.b.WriteConfig(uint32(off[0]), take(4))
				}
			case op&0x10 != 0: // writable buffers
				var b [4]byte
				copy(b[:], take(3))
				v := binary.LittleEndian.Uint32(b[:])
				r.send(queue, nil, []virtiotest.Buffer{{GPA: uint64(v&0xfff) * 4096, Len: v >> 4}})
				sent[queue] = true
			default:
				size := take(1)
				if len(size) == 1 {
					p := take(int(size[0]))
					gpa := r.data + uint64(n)*4096
					if err := r.mem.WriteAt(p, gpa); err != nil {
						t.Fatal(err)
					}
					r.send(queue, []virtiotest.Buffer{{GPA: gpa, Len: uint32(len(p))}}, nil)
					sent[queue] = true
				}
			}
		}
		for queue, sent := range sent {
			keep := 0
			if queue == stats {
				keep = 1
			}
			for sent && len(r.broken) == 0 {
				for {
					if _, ok := r.drivers[queue].Used(); !ok {
						break
					}
				}
				if r.drivers[queue].InFlight() <= keep {
					break
				}
				select {
				case <-r.irq[queue]:
				case err := <-r.broken:
					r.broken <- err
				case <-time.After(10 * time.Second):
					t.Fatalf("queue %d does not answer", queue)
				}
			}
		}
		if err := r.b.Pause(ctx(t)); err != nil {
			t.Fatal(err)
		}
		if err := r.b.Resume(); err != nil {
			t.Fatal(err)
		}
	})
}
