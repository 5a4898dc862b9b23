package virtio_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

const (
	ramBase  = 0x10000
	slotSize = 4096 // bytes of each request
)

// layouts are the ways a queue can be negotiated.
var layouts = []struct {
	name     string
	features uint64
}{
	{"split", virtio.FeatureVersion1 | virtio.FeatureIndirectDesc},
	{"split event_idx", virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx},
	{"packed", virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureRingPacked},
	{"packed event_idx", virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureRingPacked | virtio.FeatureEventIdx},
}

// rig is a queue with a driver at its other end.
type rig struct {
	t          testing.TB
	mem        *virtiotest.Memory
	driver     *virtiotest.Driver
	queue      *virtio.Queue
	interrupts int
	features   uint64
}

func newRig(t testing.TB, size uint16, features uint64) *rig {
	t.Helper()
	r := &rig{t: t, features: features}
	r.mem = virtiotest.NewMemory(t, ramBase, int(virtiotest.RingBytes(size))+max(int(size)*slotSize, 64<<10))
	r.driver = virtiotest.NewDriver(t, r.mem, ramBase, size, features)
	r.queue = r.newQueue()
	r.driver.Start(r.queue)
	return r
}

func (r *rig) newQueue() *virtio.Queue {
	return virtio.NewQueue(r.mem, virtio.MaxQueueSize, func() { r.interrupts++ })
}

// buffers is where requests may keep their bytes.
func (r *rig) buffers() uint64 { return ramBase + virtiotest.RingBytes(r.queue.Size()) }

func (r *rig) next(c *virtio.Chain) bool {
	r.t.Helper()
	ok, err := r.queue.Next(c)
	if err != nil {
		r.t.Fatal(err)
	}
	return ok
}

var check = testenv.Check

func eachLayout(t *testing.T, f func(t *testing.T, features uint64)) {
	for _, l := range layouts {
		t.Run(l.name, func(t *testing.T) { f(t, l.features) })
	}
}

// Requests of random shapes, many in flight, given back out of order, arrive
// whole and come back with what was written, over many rounds of the ring; all
// that the device writes is marked; the queue moves to another machine at any time.
func TestModel(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		for seed := range uint64(7) {
			size := uint16(1) << (seed % 7)
			if features&virtio.FeatureRingPacked != 0 && seed%2 == 1 {
				size += size / 2
			}
			t.Run(fmt.Sprintf("size %d seed %d", size, seed), func(t *testing.T) { model(t, size, features, seed) })
		}
	})
}

type request struct {
	out, in []virtiotest.Buffer
	data    []byte
}

func model(t *testing.T, size uint16, features, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, uint64(size)))
	r := newRig(t, size, features)
	sent := map[uint16]*request{}
	var taken []*virtio.Chain
	var order []uint16 // tokens in the order they were added
	freeSlots := rng.Perm(int(size))
	slotOf := map[uint16]int{}
	for step := range 1500 {
		switch rng.IntN(6) {
		case 0, 1: // the driver adds one
			if len(freeSlots) == 0 {
				break
			}
			req, at := &request{}, r.buffers()+uint64(freeSlots[0])*slotSize
			for range 1 + rng.IntN(min(int(size), 5)) {
				b := virtiotest.Buffer{GPA: at, Len: uint32(rng.IntN(700))}
				at += uint64(b.Len) + uint64(rng.IntN(50))
				if rng.IntN(2) == 0 {
					req.out = append(req.out, b)
				} else {
					req.in = append(req.in, b)
				}
			}
			for _, b := range req.out {
				p := r.driver.Bytes(b.GPA, uint64(b.Len))
				for i := range p {
					p[i] = byte(rng.Uint32())
				}
				req.data = append(req.data, p...)
			}
			r.driver.Indirect = rng.IntN(3) == 0
			if token, ok := r.driver.Add(req.out, req.in); ok {
				slotOf[token], freeSlots = freeSlots[0], freeSlots[1:]
				sent[token] = req
				order = append(order, token)
			}
		case 2: // the device takes one
			c := new(virtio.Chain)
			if ok := r.next(c); ok != (len(order) > 0) {
				t.Fatalf("step %d: Next %v, %d were added", step, ok, len(order))
			} else if !ok {
				break
			}
			req := sent[order[0]]
			got := make([]byte, c.ReadableLen()+10)
			if n := c.ReadAt(got, 0); n != len(req.data) || !bytes.Equal(got[:n], req.data) {
				t.Fatalf("step %d: read %d bytes, want %d", step, n, len(req.data))
			}
			if rng.IntN(8) == 0 {
				check(t, r.queue.Rewind(c))
				break
			}
			order = order[1:]
			taken = append(taken, c)
		case 3: // it gives one back, or two at once
			if len(taken) == 0 {
				break
			}
			before := r.mem.Snapshot()
			rng.Shuffle(len(taken), func(i, j int) { taken[i], taken[j] = taken[j], taken[i] })
			n := min(len(taken), 1+rng.IntN(3))
			chains, written := make([]virtio.Chain, n), make([]uint32, n)
			for i := range n {
				written[i] = uint32(rng.IntN(taken[i].WritableLen() + 1))
				left := int(written[i])
				for _, s := range taken[i].Writable {
					for j := range s.Buf[:min(left, len(s.Buf))] {
						s.Buf[j] ^= byte(1 + rng.IntN(255))
					}
					left -= min(left, len(s.Buf))
				}
				chains[i] = *taken[i]
			}
			taken = taken[n:]
			if n == 1 {
				check(t, r.queue.Done(&chains[0], written[0]))
			} else {
				check(t, r.queue.DoneAll(chains, written))
			}
			if lost := r.mem.Unmarked(before); len(lost) > 0 {
				t.Fatalf("step %d: written and not marked: %#x", step, lost)
			}
			r.queue.Notify()
		case 4: // the driver takes one back
			u, ok := r.driver.Used()
			if !ok {
				break
			}
			freeSlots = append(freeSlots, slotOf[u.Token])
			delete(sent, u.Token)
		case 5: // it moves
			s, err := r.queue.SaveState()
			if len(taken) > 0 {
				if !errors.Is(err, virtio.ErrInFlight) {
					t.Fatalf("saved with %d chains out: %v", len(taken), err)
				}
				break
			}
			check(t, err)
			r.queue = r.newQueue()
			check(t, r.queue.Start(s, features))
			again, err := r.queue.SaveState()
			if check(t, err); again != s {
				t.Fatalf("saved %+v, loaded, saved %+v", s, again)
			}
		}
	}
}
