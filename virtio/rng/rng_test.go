package rng

import (
	"bytes"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/transport/transporttest"
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

// Beyond the burst requests wait until their time has come, and a pause does
// not wait for them.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New(Config{Rate: maxRequest})
		r := newRig(t, d, virtio.FeatureVersion1)
		const free = burst/maxRequest + 1 // the budget may be overdrawn by one
		for range free + 2 {
			if _, ok := r.driver.Add(nil, []virtiotest.Buffer{{GPA: r.free, Len: maxRequest}}); !ok {
				t.Fatal("the ring is full")
			}
		}
		served := func(want int) {
			t.Helper()
			synctest.Wait()
			for range want {
				if _, ok := r.driver.Used(); !ok {
					t.Fatal("less than the rate")
				}
			}
			if _, ok := r.driver.Used(); ok {
				t.Fatal("more than the rate")
			}
		}
		r.queue.Signal()
		served(free)
		r.queue.Signal() // to kick does not help
		time.Sleep(time.Second - 1)
		served(0)
		if err := d.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := r.queue.SaveState(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Nanosecond)
		served(0)
		if err := d.Resume(); err != nil {
			t.Fatal(err)
		}
		served(1)
		time.Sleep(time.Second)
		served(1)
	})
}

func TestPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New(Config{})
		r := newRig(t, d, virtio.FeatureVersion1)
		if err := d.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.add(virtiotest.Buffer{GPA: r.free, Len: 64})
		synctest.Wait()
		if _, ok := r.driver.Used(); ok {
			t.Fatal("served while it was paused")
		}
		if err := d.Resume(); err != nil {
			t.Fatal(err)
		}
		r.wait()
	})
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

// FuzzDevice is a guest that does anything with the device's registers and rings.
func FuzzDevice(f *testing.F) {
	transporttest.Fuzz(f, transporttest.Device{
		New:      func(testing.TB, *virtiotest.Memory) virtio.Device { return New(Config{}) },
		Requests: []transporttest.Request{{Queue: 0, Writable: 3}},
	})
}
