package virtio_test

import (
	"testing"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// hostileRing lets a fuzzer write all of a small guest's memory and then have
// the device serve its queue, again and again. Whatever is in the rings: no
// panic, every segment is RAM, no chain is longer than allowed, the device
// has no more of them than the ring can hold, all that the device writes is
// marked, and a state that was saved loads and is the same.
func hostileRing(f *testing.F, features uint64) {
	const (
		base  = 0x4000
		size  = 8
		pages = 3
	)
	// A request of one writable page and a bit, and what follows.
	desc := []byte{0xf0, 0x4f, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 2, 0, 0, 0}
	wake := []byte{0, 0x02, 0x01, 1, 1, 0}
	if features&virtio.FeatureRingPacked != 0 {
		desc[12], desc[14] = 0, 2|1<<7
		wake = nil
	}
	seed := append(append([]byte{0, 0, 0, 15}, desc...), wake...)
	seed = append(seed, 4, 0, 0, 0, 4, 0, 0, 0, 5, 0, 4, 0, 7, 0, 0, 0, 4, 0, 0, 0)
	for options := range uint8(4) {
		f.Add(seed, options)
	}
	mem := virtiotest.NewMemory(f, base, pages*mempage.Size)
	f.Fuzz(func(t *testing.T, ops []byte, options uint8) {
		all, err := mem.Slice(base, pages*mempage.Size)
		if err != nil {
			t.Fatal(err)
		}
		clear(all)
		features := features
		for i, bit := range []uint64{virtio.FeatureEventIdx, virtio.FeatureIndirectDesc} {
			if options>>i&1 != 0 {
				features |= bit
			}
		}
		state := virtio.QueueState{Size: size, Enabled: true, Desc: base, Driver: base + 0x100, Device: base + 0x200}
		q := virtio.NewQueue(mem, size, func() {})
		if err := q.Start(state, features); err != nil {
			t.Fatal(err)
		}
		var out []*virtio.Chain
		for len(ops) >= 4 {
			switch op := ops[0] % 8; op {
			case 0, 1, 2, 3: // the guest writes up to 16 bytes
				at := int(ops[1]) | int(ops[2])<<8
				n := min(int(ops[3]%16)+1, len(ops)-4)
				copy(all[at%len(all):], ops[4:4+n])
				ops = ops[n:]
			case 4: // the device looks
				c := new(virtio.Chain)
				before := mem.Snapshot()
				ok, err := q.Next(c)
				if lost := mem.Unmarked(before); len(lost) > 0 {
					t.Fatalf("Next wrote pages %#x and did not mark them", lost)
				}
				if ok && err != nil {
					t.Fatal("a chain and an error")
				}
				if !ok {
					break
				}
				checkChain(t, mem, c)
				if out = append(out, c); len(out) > size {
					t.Fatalf("%d chains of a queue of %d", len(out), size)
				}
			case 5, 6: // it gives back
				if len(out) == 0 {
					break
				}
				i := int(ops[1]) % len(out)
				c := out[i]
				out = append(out[:i], out[i+1:]...)
				before := mem.Snapshot()
				n := min(int(ops[2])<<8, c.WritableLen())
				left := n
				for _, s := range c.Writable {
					for j := range s.Buf[:min(left, len(s.Buf))] {
						s.Buf[j] ^= 0x55
					}
					left -= min(left, len(s.Buf))
				}
				if err := q.Done(c, uint32(n)); err != nil {
					t.Fatal(err)
				}
				q.Notify()
				if lost := mem.Unmarked(before); len(lost) > 0 {
					t.Fatalf("Done wrote pages %#x and did not mark them", lost)
				}
			case 7: // it moves
				s, err := q.SaveState()
				if (err != nil) != (len(out) > 0) {
					t.Fatalf("saved with %d chains out: %v", len(out), err)
				}
				if err != nil {
					break
				}
				dst := virtio.NewQueue(mem, size, func() {})
				if err := dst.Start(s, features); err != nil {
					t.Fatal(err)
				}
				if again, err := dst.SaveState(); err != nil || again != s {
					t.Fatalf("saved %+v, then %+v, %v", s, again, err)
				}
				q = dst
			}
			ops = ops[4:]
		}
	})
}

func checkChain(t *testing.T, mem *virtiotest.Memory, c *virtio.Chain) {
	t.Helper()
	if len(c.Readable)+len(c.Writable) > virtio.MaxChain {
		t.Fatalf("%d segments", len(c.Readable)+len(c.Writable))
	}
	total := 0
	for _, list := range [][]virtio.Segment{c.Readable, c.Writable} {
		for _, s := range list {
			b, err := mem.Slice(s.GPA, uint64(len(s.Buf)))
			if err != nil || len(b) == 0 || &b[0] != &s.Buf[0] {
				t.Fatalf("segment at gpa %#x of %d bytes: %v", s.GPA, len(s.Buf), err)
			}
			total += len(b)
		}
	}
	if total != c.ReadableLen()+c.WritableLen() {
		t.Fatalf("%d bytes in segments, the chain says %d and %d", total, c.ReadableLen(), c.WritableLen())
	}
}

func FuzzSplit(f *testing.F) { hostileRing(f, virtio.FeatureVersion1) }

func FuzzPacked(f *testing.F) { hostileRing(f, virtio.FeatureVersion1|virtio.FeatureRingPacked) }
