package rng

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
)

const base = 0x100000

type rig struct {
	t         testing.TB
	d         *Device
	mem       *virtiotest.Memory
	driver    *virtiotest.Driver
	queue     *virtio.Queue
	interrupt chan struct{}
	reset     chan error
	free      uint64
}

func (r *rig) ConfigChanged() {}
func (r *rig) NeedsReset(err error) {
	select {
	case r.reset <- err:
	default:
	}
}

func newRig(t testing.TB, d *Device, features uint64) *rig {
	t.Helper()
	r := &rig{t: t, d: d, interrupt: make(chan struct{}, 1), reset: make(chan error, 1)}
	r.mem = virtiotest.NewMemory(t, base, 1<<20)
	r.driver = virtiotest.NewDriver(t, r.mem, base, queueSize, features)
	r.queue = virtio.NewQueue(r.mem, queueSize, func() {
		select {
		case r.interrupt <- struct{}{}:
		default:
		}
	})
	r.driver.Start(r.queue)
	r.free = base + virtiotest.RingBytes(queueSize)
	if err := d.Activate(features, []*virtio.Queue{r.queue}, r); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Reset)
	return r
}

func (r *rig) add(buffers ...virtiotest.Buffer) {
	r.t.Helper()
	if _, ok := r.driver.Add(nil, buffers); !ok {
		r.t.Fatal("the ring is full")
	}
	if r.driver.WantsKick() {
		r.queue.Signal()
	}
}

func (r *rig) wait() virtiotest.Used {
	r.t.Helper()
	for {
		if u, ok := r.driver.Used(); ok {
			return u
		}
		select {
		case <-r.interrupt:
		case err := <-r.reset:
			r.t.Fatal(err)
		}
	}
}

func TestEntropy(t *testing.T) {
	for _, features := range []uint64{virtio.FeatureVersion1, virtio.FeatureVersion1 | virtio.FeatureRingPacked | virtio.FeatureEventIdx} {
		r := newRig(t, New(Config{}), features)
		before := r.mem.Snapshot()
		r.add(virtiotest.Buffer{GPA: r.free + 4000, Len: 64}, virtiotest.Buffer{GPA: r.free + 8190, Len: 32})
		if u := r.wait(); u.Len != 96 {
			t.Fatalf("length %d", u.Len)
		}
		for _, b := range [][]byte{r.driver.Bytes(r.free+4000, 64), r.driver.Bytes(r.free+8190, 32)} {
			if bytes.Equal(b, make([]byte, len(b))) {
				t.Error("no entropy")
			}
		}
		for _, gpa := range r.mem.Unmarked(before) {
			if gpa >= r.free {
				t.Errorf("written and not marked: %#x", gpa)
			}
		}
		r.add(virtiotest.Buffer{GPA: r.free, Len: 3 * maxRequest})
		if u := r.wait(); u.Len != maxRequest {
			t.Errorf("a large request got %d bytes", u.Len)
		}
		if !bytes.Equal(r.driver.Bytes(r.free+8222, 100), make([]byte, 100)) {
			t.Error("bytes behind the length were written")
		}
	}
}

// clock is one that the test turns.
type clock struct {
	now   time.Time
	timer chan time.Time
	asked chan time.Duration
}

func (c *clock) put(d *Device) {
	d.now = func() time.Time { return c.now }
	d.after = func(w time.Duration) <-chan time.Time { c.asked <- w; return c.timer }
}

// Beyond the burst requests wait until their time has come, and a pause does
// not wait for them.
func TestRate(t *testing.T) {
	d := New(Config{Rate: maxRequest})
	c := &clock{time.Unix(1, 0), make(chan time.Time), make(chan time.Duration)}
	c.put(d)
	r := newRig(t, d, virtio.FeatureVersion1)
	const free = burst/maxRequest + 1 // the budget may be overdrawn by one
	for range free + 2 {
		if _, ok := r.driver.Add(nil, []virtiotest.Buffer{{GPA: r.free, Len: maxRequest}}); !ok {
			t.Fatal("the ring is full")
		}
	}
	r.queue.Signal()
	if w := <-c.asked; w != time.Second {
		t.Fatalf("waits %v", w)
	}
	for range free {
		r.wait()
	}
	if _, ok := r.driver.Used(); ok {
		t.Fatal("more than the burst")
	}
	if err := d.Pause(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.queue.SaveState(); err != nil {
		t.Fatal(err)
	}
	if err := d.Resume(); err != nil {
		t.Fatal(err)
	}
	c.now = c.now.Add(time.Second)
	c.timer <- c.now
	r.wait()
	if w := <-c.asked; w != time.Second {
		t.Fatalf("waits %v", w)
	}
}

func TestPause(t *testing.T) {
	d := New(Config{})
	r := newRig(t, d, virtio.FeatureVersion1)
	if err := d.Pause(context.Background()); err != nil {
		t.Fatal(err)
	}
	r.add(virtiotest.Buffer{GPA: r.free, Len: 64})
	if wait, err := d.serve(new(virtio.Chain)); wait != 0 || err != nil {
		t.Fatal(wait, err)
	}
	if _, ok := r.driver.Used(); ok {
		t.Fatal("served while it was paused")
	}
	if err := d.Resume(); err != nil {
		t.Fatal(err)
	}
	r.queue.Signal()
	r.wait()
}

func TestBrokenRing(t *testing.T) {
	r := newRig(t, New(Config{}), virtio.FeatureVersion1)
	r.add(virtiotest.Buffer{GPA: 0, Len: 64})
	if err := <-r.reset; !errors.Is(err, virtio.ErrRing) {
		t.Fatal(err)
	}
}

func TestState(t *testing.T) {
	d := New(Config{})
	b, err := d.SaveState()
	if err != nil || b != nil {
		t.Fatal(b, err)
	}
	if err := d.LoadState(nil); err != nil {
		t.Fatal(err)
	}
	if err := d.LoadState([]byte{1}); err == nil {
		t.Fatal("a state was loaded")
	}
}

// However often it is asked, a second gives no more than the rate.
func TestBudget(t *testing.T) {
	for _, rate := range []uint64{1, 1000, DefaultRate, 1 << 40} {
		b := budget{rate: rate}
		now, given := time.Unix(1, 0), 0.0
		end := now.Add(time.Minute)
		for step := 0; step < 100000 && now.Before(end); step++ {
			if wait := b.wait(now); wait > 0 {
				now = now.Add(wait)
				continue
			}
			b.spend(now, 1000)
			given += 1000
		}
		if most := float64(rate)*60 + burst + 1000; given > most {
			t.Errorf("rate %d: %.0f bytes in a minute", rate, given)
		}
	}
}

// FuzzRequests gives the device buffers of any kind; each is answered, or the
// ring is broken.
func FuzzRequests(f *testing.F) {
	f.Add([]byte{1, 64, 0, 2, 0, 0})
	f.Fuzz(func(t *testing.T, input []byte) {
		r := newRig(t, New(Config{Rate: 1 << 40}), virtio.FeatureVersion1)
		for len(input) >= 3 {
			b := virtiotest.Buffer{GPA: r.free + uint64(input[1])<<10, Len: uint32(input[2]) * 37}
			if input[1] == 255 {
				b.GPA = 1<<64 - 10
			}
			var readable, writable []virtiotest.Buffer
			if input[0]&1 != 0 {
				readable = append(readable, b)
			}
			if input[0]&2 != 0 || input[0]&1 == 0 {
				writable = append(writable, b)
			}
			input = input[3:]
			if _, ok := r.driver.Add(readable, writable); !ok {
				t.Fatal("the ring is full")
			}
			r.queue.Signal()
			for {
				if _, ok := r.driver.Used(); ok {
					break
				}
				select {
				case <-r.interrupt:
					continue
				case <-r.reset:
					return
				}
			}
		}
	})
}
