package virtio_test

import (
	"errors"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

type failOn struct{ t testing.TB }

func (f failOn) ConfigChanged()       {}
func (f failOn) NeedsReset(err error) { f.t.Error(err) }

// A driver and a device that sleep whenever they may, and wake each other only
// when asked to: neither sleeps for ever. The barriers are for that.
func TestNoLostWakeup(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		requests := 20000
		if testing.Short() {
			requests = 2000
		}
		r := newRig(t, 4, features)
		interrupts := make(chan struct{}, 1)
		var raised atomic.Int64
		r.queue = virtio.NewQueue(r.mem, 4, func() {
			raised.Add(1)
			select {
			case interrupts <- struct{}{}:
			default:
			}
		})
		r.driver.Start(r.queue)
		w := startLoop(t, r.queue, func(c *virtio.Chain) {
			if c.ReadableLen()%7 == 0 {
				runtime.Gosched()
			}
		})
		kicks := 0
		for added, back := 0, 0; back < requests; {
			for added < requests {
				if _, ok := r.driver.Add([]virtiotest.Buffer{{GPA: r.buffers(), Len: uint32(added%50) + 1}}, nil); !ok {
					break
				}
				if added++; added%3 == 0 && r.driver.WantsKick() {
					kicks++
					r.queue.Signal()
				}
			}
			if r.driver.WantsKick() {
				kicks++
				r.queue.Signal()
			}
			got := 0
			for {
				if _, ok := r.driver.Used(); !ok {
					break
				}
				got++
			}
			back += got
			if got == 0 {
				r.driver.SetInterrupts(true)
				if _, ok := r.driver.Used(); ok {
					back++
					continue
				}
				<-interrupts
			}
		}
		w.Stop()
		t.Logf("%d requests, %d kicks, %d interrupts", requests, kicks, raised.Load())
	})
}

// With EVENT_IDX the driver says which used element it wants to be told of.
func TestInterruptWhenAsked(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		r := newRig(t, 8, features)
		buf := []virtiotest.Buffer{{GPA: r.buffers(), Len: 4}}
		serve := func(n int) int {
			before := r.interrupts
			var c virtio.Chain
			for range n {
				r.driver.Add(buf, nil)
				if !r.next(&c) {
					t.Fatal("nothing there")
				}
				check(t, r.queue.Done(&c, 0))
				r.queue.Notify()
			}
			return r.interrupts - before
		}
		drain := func() {
			for {
				if _, ok := r.driver.Used(); !ok {
					return
				}
			}
		}
		for round := range 10 {
			want := 3
			if features&virtio.FeatureEventIdx != 0 {
				want = 1
			}
			r.driver.SetInterrupts(true)
			if n := serve(3); n != want {
				t.Fatalf("round %d: %d interrupts for 3 requests, want %d", round, n, want)
			}
			drain()
			r.driver.SetInterrupts(false)
			if n := serve(5); n != 0 {
				t.Fatalf("round %d: %d interrupts that nobody asked for", round, n)
			}
			drain()
			r.queue.Notify()
			if r.interrupts != (round+1)*want {
				t.Fatalf("round %d: an interrupt for nothing", round)
			}
		}
	})
}

// A queue that is reset waits for what is out, hands out nothing meanwhile, and
// starts anew.
func TestDrain(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		r := newRig(t, 8, features)
		buf := []virtiotest.Buffer{{GPA: r.buffers(), Len: 4}}
		r.driver.Add(buf, nil)
		r.driver.Add(buf, nil)
		var a, b virtio.Chain
		if !r.next(&a) {
			t.Fatal("nothing there")
		}
		r.queue.Quiesce()
		if r.next(&b) {
			t.Fatal("a queue that is drained handed out a chain")
		}
		drained := make(chan struct{})
		go func() { r.queue.Drain(); close(drained) }()
		select {
		case <-drained:
			t.Fatal("drained with a chain out")
		default:
		}
		check(t, r.queue.Done(&a, 0))
		<-drained
		r.queue.Stop()
		if r.next(&b) {
			t.Fatal("a stopped queue handed out a chain")
		}
		r.driver = virtiotest.NewDriver(t, r.mem, ramBase, 8, features)
		r.driver.Start(r.queue)
		r.driver.Add(buf, nil)
		if !r.next(&a) {
			t.Fatal("nothing there after a reset")
		}
		// Stopped under the device's hands: what it gives back goes nowhere.
		r.queue.Stop()
		before := r.mem.Snapshot()
		check(t, r.queue.Done(&a, 0))
		if after := r.mem.Snapshot(); string(after) != string(before) {
			t.Error("a chain of a stopped queue was used")
		}
		if err := r.queue.Done(&a, 0); !errors.Is(err, virtio.ErrNotOut) {
			t.Errorf("given back twice: %v", err)
		}
	})
}

// Rewind takes back the last one only.
func TestRewindOrder(t *testing.T) {
	r := newRig(t, 8, layouts[0].features)
	buf := []virtiotest.Buffer{{GPA: r.buffers(), Len: 4}}
	r.driver.Add(buf, nil)
	r.driver.Add(buf, nil)
	var a, b virtio.Chain
	if !r.next(&a) || !r.next(&b) {
		t.Fatal("nothing there")
	}
	if err := r.queue.Rewind(&a); !errors.Is(err, virtio.ErrNotOut) {
		t.Errorf("rewound the first of two: %v", err)
	}
	check(t, r.queue.Rewind(&b))
	check(t, r.queue.Rewind(&a))
	if s, err := r.queue.SaveState(); err != nil || s.NextAvail != 0 {
		t.Errorf("%+v, %v", s, err)
	}
}

// Requests cost no allocation.
func TestNoAllocation(t *testing.T) {
	eachLayout(t, func(t *testing.T, features uint64) {
		r := newRig(t, 8, features)
		out := []virtiotest.Buffer{{GPA: r.buffers(), Len: 100}, {GPA: r.buffers() + 200, Len: 100}}
		var c virtio.Chain
		serve := func() {
			if !r.next(&c) {
				return
			}
			check(t, r.queue.Done(&c, 100))
			r.queue.Notify()
		}
		r.driver.Add(out[:1], out[1:])
		serve()
		s, err := r.queue.SaveState()
		check(t, err)
		for range 7 {
			// Two, since AllocsPerRun warms up. The driver, which allocates, is
			// not among the measured.
			for range 2 {
				r.driver.Used()
				r.driver.Add(out[:1], out[1:])
			}
			if n := testing.AllocsPerRun(1, serve); n != 0 {
				t.Errorf("%v allocations", n)
			}
		}
		if now, err := r.queue.SaveState(); err != nil || now.NextUsed == s.NextUsed {
			t.Errorf("nothing was served: %v", err)
		}
	})
}

// BenchmarkRequest is a request of two buffers through a queue, the driver's
// part included.
func BenchmarkRequest(b *testing.B) {
	for _, l := range layouts {
		b.Run(l.name, func(b *testing.B) {
			r := newRig(b, 256, l.features)
			mem := unmarked{r.mem}
			r.queue = virtio.NewQueue(mem, 256, func() {})
			r.driver.Start(r.queue)
			out := []virtiotest.Buffer{{GPA: r.buffers(), Len: 16}, {GPA: r.buffers() + 200, Len: 1500}}
			var c virtio.Chain
			b.ReportAllocs()
			for b.Loop() {
				r.driver.Add(out[:1], out[1:])
				if !r.next(&c) {
					b.Fatal("nothing there")
				}
				check(b, r.queue.Done(&c, 1500))
				r.queue.Notify()
				r.driver.Used()
			}
		})
	}
}

// unmarked is memory without virtiotest's costly marks.
type unmarked struct{ *virtiotest.Memory }

func (unmarked) MarkDirty(uint64, uint64) error { return nil }
