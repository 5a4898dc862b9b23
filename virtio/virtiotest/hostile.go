package virtiotest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/govmm/govmm/virtio"
)

// Hostile is a driver that breaks the rules: seeded random requests, addresses
// outside of RAM, overwritten rings, and resets of queues and of the device at any
// time. [Hostile.Attack] runs it against a device over both queue formats.
type Hostile struct {
	// New makes a fresh device whose guest memory is mem. The driver's rings
	// are in mem, too. Attack closes the device.
	New func(t testing.TB, mem *Memory) virtio.Device
	// Request returns the first readable bytes of a request for a queue, such
	// as a header that the device accepts. It may be nil.
	Request func(r *rand.Rand, queue int) []byte
	// Host does something on the host's side of the device, such as sending a
	// frame to the guest. It does not wait. It may be nil.
	Host func(r *rand.Rand)
	// Bound is how long Pause, Reset and the reset of a queue may take; 0: 10 s.
	Bound time.Duration
}

const (
	hostileBase  = 0x100000
	hostileSteps = 300
	// hostileData is the RAM behind the rings that requests point to.
	hostileData = 1 << 20
)

// Attack fails the test if Pause, Reset, SaveState or the reset of a queue does
// not come to an end, or a chain is out after one of them.
func (h Hostile) Attack(t *testing.T) {
	if h.Bound == 0 {
		h.Bound = 10 * time.Second
	}
	for _, layout := range []struct {
		name     string
		features uint64
	}{
		{"split", virtio.FeatureVersion1 | virtio.FeatureIndirectDesc},
		{"split event_idx", virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureEventIdx},
		{"packed", virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureRingPacked},
		{"packed event_idx", virtio.FeatureVersion1 | virtio.FeatureIndirectDesc | virtio.FeatureRingPacked | virtio.FeatureEventIdx},
	} {
		for seed := range uint64(4) {
			t.Run(fmt.Sprintf("%s/seed %d", layout.name, seed), func(t *testing.T) { h.attack(t, layout.features, seed) })
		}
	}
}

// attacker is one run of a Hostile.
type attacker struct {
	Hostile
	t        *testing.T
	r        *rand.Rand
	mem      *Memory
	dev      virtio.Device
	features uint64
	queues   []*attackedQueue
	broken   atomic.Bool
}

type attackedQueue struct {
	*virtio.Queue
	driver *Driver // nil when the ring was overwritten with anything
	at     uint64  // gpa of the ring
	size   uint16
}

// ConfigChanged implements virtio.Notifier.
func (a *attacker) ConfigChanged() {}

// NeedsReset implements virtio.Notifier.
func (a *attacker) NeedsReset(error) { a.broken.Store(true) }

func (h Hostile) attack(t *testing.T, features, seed uint64) {
	a := &attacker{Hostile: h, t: t, r: rand.New(rand.NewPCG(seed, 12))}
	sizes := a.sizes()
	need := hostileData
	for _, n := range sizes {
		need += int(RingBytes(n))
	}
	a.mem = NewMemory(t, hostileBase, need)
	a.dev = h.New(t, a.mem)
	a.features = features | a.dev.Features()
	at := uint64(hostileBase + hostileData)
	for _, n := range sizes {
		a.queues = append(a.queues, &attackedQueue{Queue: virtio.NewQueue(a.mem, n, func() {}), at: at, size: n})
		at += RingBytes(n)
	}
	a.activate()
	for range hostileSteps {
		a.step()
	}
	a.pause()
	a.reset()
	a.bounded("close", func() { closeDevice(a.dev) })
}

// sizes asks a device that is used for nothing else.
func (a *attacker) sizes() []uint16 {
	d := a.New(a.t, NewMemory(a.t, hostileBase, hostileData))
	defer closeDevice(d)
	d.Reset()
	return d.QueueSizes()
}

// closeDevice gives back what a device holds of the host, if it does.
func closeDevice(d virtio.Device) {
	if c, ok := d.(io.Closer); ok {
		_ = c.Close()
	}
}

// bounded fails the test if f does not return in time.
func (a *attacker) bounded(what string, f func()) {
	a.t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(a.Bound):
		stacks := make([]byte, 1<<20)
		a.t.Fatalf("%s does not come to an end\n%s", what, stacks[:runtime.Stack(stacks, true)])
	}
}

func (a *attacker) activate() {
	a.t.Helper()
	a.broken.Store(false)
	var queues []*virtio.Queue
	for _, q := range a.queues {
		a.start(q)
		queues = append(queues, q.Queue)
	}
	if err := a.dev.Activate(a.features, queues, a); err != nil {
		a.t.Fatal(err)
	}
}

func (a *attacker) start(q *attackedQueue) {
	a.t.Helper()
	q.driver = NewDriver(a.t, a.mem, q.at, q.size, a.features)
	q.driver.Start(q.Queue)
	q.Signal()
}

func (a *attacker) step() {
	i := a.r.IntN(len(a.queues))
	switch n := a.r.IntN(100); {
	case n < 3:
		a.reset()
		a.activate()
	case n < 9:
		a.resetQueue(i)
	case n < 14:
		a.pause()
		if err := a.dev.Resume(); err != nil {
			a.t.Fatal(err)
		}
		for _, q := range a.queues {
			q.Signal()
		}
	case n < 17:
		a.scribble(a.queues[i])
	case n < 20:
		var p [4]byte
		a.fill(p[:])
		a.dev.WriteConfig(uint32(a.r.IntN(64)), p[:])
	case n < 30 && a.Host != nil:
		a.Host(a.r)
	case n < 33:
		time.Sleep(time.Duration(a.r.IntN(300)) * time.Microsecond)
	default:
		for range 1 + a.r.IntN(8) {
			a.add(i)
		}
	}
	if a.broken.Load() && a.r.IntN(8) == 0 {
		switch a.r.IntN(3) {
		case 0:
			for i := range a.queues {
				a.resetQueue(i)
			}
		case 1:
			a.pause()
		}
		a.reset()
		a.activate()
	}
}

func (a *attacker) fill(p []byte) {
	for i := range p {
		p[i] = byte(a.r.Uint32())
	}
}

// scribble overwrites a part of the ring, from the descriptors to the device's
// own area.
func (a *attacker) scribble(q *attackedQueue) {
	s := q.driver
	if s == nil {
		return
	}
	b := s.Bytes(q.at, s.tables-q.at)
	off := a.r.IntN(len(b))
	if a.r.IntN(2) == 0 {
		off = a.r.IntN(int(q.size) * 16)
	}
	a.fill(b[off:min(len(b), off+64)])
	q.driver = nil
	q.Signal()
}

// add makes a request available: random buffers, a few of them outside of RAM.
func (a *attacker) add(queue int) {
	q := a.queues[queue]
	if q.driver == nil {
		q.Signal()
		return
	}
	for {
		if _, ok := q.driver.Used(); !ok {
			break
		}
	}
	var readable, writable []Buffer
	for range a.r.IntN(4) {
		readable = append(readable, a.buffer())
	}
	for range a.r.IntN(4) {
		writable = append(writable, a.buffer())
	}
	if a.Request != nil && a.r.IntN(4) > 0 {
		p := a.Request(a.r, queue)
		b := Buffer{GPA: hostileBase + uint64(a.r.IntN(hostileData-len(p)-1)), Len: uint32(len(p))}
		copy(a.bytes(b), p)
		readable = append([]Buffer{b}, readable...)
	}
	if len(readable)+len(writable) == 0 {
		writable = append(writable, a.buffer())
	}
	q.driver.Indirect = a.r.IntN(3) == 0
	q.driver.Add(readable, writable)
	if a.r.IntN(4) > 0 {
		q.Signal()
	}
}

func (a *attacker) bytes(b Buffer) []byte {
	p, err := a.mem.Slice(b.GPA, uint64(b.Len))
	if err != nil {
		a.t.Fatal(err)
	}
	return p
}

func (a *attacker) buffer() Buffer {
	at := uint64(a.r.IntN(hostileData))
	n := uint32(a.r.IntN(hostileData - int(at)))
	switch a.r.IntN(200) {
	case 0:
		at, n = a.r.Uint64(), a.r.Uint32() // anywhere
	case 1:
		n = 0
	default:
		n >>= a.r.IntN(20)
	}
	return Buffer{GPA: hostileBase + at, Len: n}
}

// resetQueue does what the transport does when the driver resets one queue.
func (a *attacker) resetQueue(i int) {
	a.t.Helper()
	q := a.queues[i]
	a.bounded(fmt.Sprintf("the reset of queue %d", i), func() {
		q.Quiesce()
		a.dev.ResetQueue(q.Queue)
		q.Drain()
	})
	q.Stop()
	a.start(q)
}

func (a *attacker) reset() {
	a.t.Helper()
	a.bounded("Reset", a.dev.Reset)
	a.inRing("Reset")
	for _, q := range a.queues {
		q.Stop()
	}
}

func (a *attacker) pause() {
	a.t.Helper()
	a.bounded("Pause", func() {
		ctx, cancel := context.WithTimeout(context.Background(), a.Bound)
		defer cancel()
		if err := a.dev.Pause(ctx); err != nil {
			a.t.Errorf("Pause: %v", err)
		}
	})
	a.inRing("Pause")
	if _, err := a.dev.SaveState(); err != nil {
		a.t.Errorf("SaveState: %v", err)
	}
}

// inRing checks that no chain is out.
func (a *attacker) inRing(after string) {
	a.t.Helper()
	for i, q := range a.queues {
		if _, err := q.SaveState(); errors.Is(err, virtio.ErrInFlight) {
			a.t.Fatalf("queue %d after %s: %v", i, after, err)
		}
	}
}
