package blk

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/limit"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// limited is a disk with limits, in a bubble of testing/synctest, whose clock stands
// still while anybody works.
func limited(t *testing.T, r limit.Rates, test func(t *testing.T, r *rig)) {
	t.Helper()
	for name, features := range layouts {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				test(t, newRig(t, open(t, Config{Path: newImage(t, 4<<20), Limit: r}), features))
			})
		})
	}
}

// queue makes a request available without waiting for it; each has its own place.
func (r *rig) queue(i int, kind uint32, n int, in bool) {
	r.t.Helper()
	gpa := r.free + uint64(i)<<13
	r.send(0, gpa, kind, 0, virtiotest.Buffer{GPA: gpa + 4096, Len: uint32(n)}, in)
}

// served counts the requests that have come back by now.
func (r *rig) served(what string, want int) {
	r.t.Helper()
	time.Sleep(time.Millisecond) // ends when nobody works
	synctest.Wait()
	n := 0
	for ; ; n++ {
		if _, ok := r.drivers[0].Used(); !ok {
			break
		}
	}
	if n != want {
		r.t.Fatalf("%s: %d requests were served, want %d", what, n, want)
	}
}

// A second has as many operations as were given, whatever they are.
func TestOperationsAreLimited(t *testing.T) {
	limited(t, limit.Rates{IOPS: 1}, func(t *testing.T, r *rig) {
		binary.LittleEndian.PutUint32(r.drivers[0].Bytes(r.free+4<<13+4096+8, 4), 8) // of the discard
		for i, kind := range []uint32{typeOut, typeIn, typeFlush, typeGetID, typeDiscard, typeWriteZeroes, 99} {
			n := map[uint32]int{typeOut: 512, typeIn: 512, typeGetID: idBytes, typeDiscard: rangeSize, typeWriteZeroes: rangeSize}[kind]
			r.queue(i, kind, n, kind == typeIn || kind == typeGetID)
		}
		r.served("the burst, and one that is owed", 2)
		for range 5 {
			time.Sleep(900 * time.Millisecond)
			r.served("less than a second", 0)
			time.Sleep(98 * time.Millisecond)
			r.served("a second", 1)
		}
		r.queue(0, typeIn, 512, true)
		time.Sleep(10 * time.Second) // quiet: the burst is one operation again
		r.served("the last one", 1)
		for i := range 5 {
			r.queue(i, typeIn, 512, true)
		}
		r.served("the burst", 2)
	})
}

// The ranges of a discard count one by one.
func TestRangesAreOperations(t *testing.T) {
	limited(t, limit.Rates{IOPS: 1}, func(t *testing.T, r *rig) {
		r.queue(0, typeDiscard, 11*rangeSize, false)
		r.queue(1, typeIn, 512, true)
		r.served("a discard", 1)
		time.Sleep(10*time.Second - 100*time.Millisecond)
		r.served("before ten ranges are paid for", 0)
		time.Sleep(200 * time.Millisecond)
		r.served("after", 1)
	})
}

// A request larger than the burst passes, and costs its time; zeros cost as data does.
func TestBytesAreLimited(t *testing.T) {
	const burst = limit.MinBurst
	for _, kind := range []uint32{typeIn, typeOut, typeWriteZeroes} {
		limited(t, limit.Rates{BPS: burst, BPSBurst: burst}, func(t *testing.T, r *rig) {
			n := 4 * burst
			if kind == typeWriteZeroes {
				n = rangeSize
				binary.LittleEndian.PutUint32(r.drivers[0].Bytes(r.free+4096+8, 4), 4*burst/SectorSize)
			}
			r.queue(0, kind, n, kind == typeIn)
			r.served("a request of four bursts", 1)
			r.queue(0, typeFlush, 0, false)
			time.Sleep(3*time.Second - 100*time.Millisecond)
			r.served("before it is paid for", 0)
			time.Sleep(200 * time.Millisecond)
			r.served("after", 1)
		})
	}
}

// Requests that wait for a limit are in their queue: a pause, a saved state and resets do
// not wait, and nothing is lost.
func TestLimitedDiskGetsQuiet(t *testing.T) {
	limited(t, limit.Rates{BPS: 1, BPSBurst: limit.MinBurst}, func(t *testing.T, r *rig) {
		begin := time.Now()
		for i := range 10 {
			r.queue(i, typeIn, 128<<10, true) // of which each takes more than a day
		}
		r.served("the first one", 1)
		if err := r.d.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		saved, err := r.queues[0].SaveState()
		if err != nil {
			t.Fatal(err)
		}
		state, err := r.d.SaveState()
		if err != nil {
			t.Fatal(err)
		}
		r.d.Reset()

		// At the destination there is another limit.
		next := open(t, Config{Path: r.d.config.Path, Limit: limit.Rates{BPS: 1 << 20, BPSBurst: 1 << 30}})
		if err := next.LoadState(state); err != nil {
			t.Fatal(err)
		}
		r.attach(next, []virtio.QueueState{saved})
		r.queues[0].Signal()
		r.served("the others, elsewhere", 9)

		for i := range 10 {
			r.queue(i, typeIn, 128<<10, true)
		}
		r.served("within the burst", 10)
		next.ResetQueue(r.queues[0])
		next.Reset()
		if now := time.Now(); now.Sub(begin) > time.Second {
			t.Errorf("somebody waited %v", now.Sub(begin))
		}
	})
}

// Without a limit nobody asks for one.
func TestNoLimit(t *testing.T) {
	d := open(t, Config{Path: newImage(t, 1<<20)})
	if s := (&worker{d: d}).server(nil); s.Ready != nil || s.Empty != nil || d.limit != nil {
		t.Error("a disk without limits asks for them")
	}
}

// A disk carries out a bounded number of requests at once, and each needs a bounded buffer.
func TestRequestsAtOnce(t *testing.T) {
	for queues := 1; queues <= MaxQueues; queues++ {
		if n := workersOf(queues); n < 4 || n > 16 || n*queues > 128 {
			t.Errorf("%d queues: %d requests of each at once", queues, n)
		}
	}
	var s scratch
	if b := s.buffer(); len(b) != bounceSize || cap(b) != bounceSize || &b[0] != &s.buffer()[0] {
		t.Errorf("a buffer of %d bytes, or a new one each time", cap(b))
	}
}
