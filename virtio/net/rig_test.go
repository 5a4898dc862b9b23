package net_test

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/virtiotest"
	"golang.org/x/sys/unix"
)

const (
	ramBase   = 0x100000
	queueSize = 256
	offloads  = net.FeatureCsum | net.FeatureHostTSO4 | net.FeatureHostTSO6 | net.FeatureHostECN | net.FeatureHostUSO |
		net.FeatureGuestCsum | net.FeatureGuestTSO4 | net.FeatureGuestTSO6 | net.FeatureGuestECN |
		net.FeatureGuestUSO4 | net.FeatureGuestUSO6
)

var guestMAC = net.MAC{0x52, 0x54, 0, 1, 2, 3}

// wire is a backend of sockets: each frame is a message.
type wire struct {
	ports []net.Port
	peers []int // the other ends

	mu       sync.Mutex
	pairs    int
	offloads uint64
	lacks    uint64 // offloads that it does not have
	fail     error
}

func newWire(t testing.TB, pairs int) *wire {
	t.Helper()
	w := &wire{}
	for range pairs {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		check(t, unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20))
		check(t, unix.SetsockoptInt(fds[1], unix.SOL_SOCKET, unix.SO_SNDBUF, 1<<20))
		p, err := net.NewPort(fds[0])
		check(t, err)
		w.ports, w.peers = append(w.ports, p), append(w.peers, fds[1])
		t.Cleanup(func() { _ = unix.Close(fds[1]) })
	}
	return w
}

func (w *wire) Name() string      { return "wire" }
func (w *wire) Ports() []net.Port { return w.ports }
func (w *wire) Offloads() uint64  { return offloads &^ w.lacks }
func (w *wire) SetOffloads(guest uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.offloads = guest
	return w.fail
}
func (w *wire) SetPairs(n int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pairs = n
	return w.fail
}
func (w *wire) Close() error { return nil }

func (w *wire) set() (pairs int, guest uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pairs, w.offloads
}

// inject sends a frame to the guest.
func (w *wire) inject(t testing.TB, pair int, p []byte) {
	t.Helper()
	if _, err := unix.Write(w.peers[pair], p); err != nil {
		t.Fatal(err)
	}
}

// sent returns the frames that the guest has sent.
func (w *wire) sent(t testing.TB, pair int) [][]byte {
	t.Helper()
	var frames [][]byte
	for {
		p := make([]byte, 1<<17)
		n, err := unix.Read(w.peers[pair], p)
		if errors.Is(err, unix.EAGAIN) {
			return frames
		}
		check(t, err)
		frames = append(frames, p[:n])
	}
}

// rig is a device with a guest's driver.
type rig struct {
	t        testing.TB
	mem      *virtiotest.Memory
	wire     *wire
	d        *net.Device
	features uint64
	drivers  []*virtiotest.Driver
	queues   []*virtio.Queue
	irq      []chan struct{}
	changed  chan struct{}
	broken   chan error
	logged   chan string
	data     uint64
}

func newRig(t testing.TB, pairs int, features uint64) *rig {
	t.Helper()
	w := newWire(t, pairs)
	return newRigOn(t, w, w, pairs, features)
}

func newRigOn(t testing.TB, b net.Backend, w *wire, pairs int, features uint64) *rig {
	t.Helper()
	return newRigWith(t, net.Config{Backend: b, MAC: guestMAC, MTU: 1500}, w, pairs, features)
}

func newRigWith(t testing.TB, c net.Config, w *wire, pairs int, features uint64) *rig {
	t.Helper()
	r := &rig{t: t, wire: w, features: features | virtio.FeatureVersion1 | virtio.FeatureIndirectDesc}
	rings := uint64(2*pairs+1) * virtiotest.RingBytes(queueSize)
	r.mem = virtiotest.NewMemory(t, ramBase, int(rings)+2<<20)
	r.data = ramBase + rings
	r.newDeviceWith(c)
	r.activate()
	return r
}

// newRigOf is a rig of a device that was made by others, with one queue pair.
func newRigOf(t testing.TB, d *net.Device, features uint64) *rig {
	t.Helper()
	r := &rig{t: t, features: features | virtio.FeatureVersion1 | virtio.FeatureIndirectDesc, changed: make(chan struct{}, 64), broken: make(chan error, 64)}
	rings := 3 * virtiotest.RingBytes(queueSize)
	r.mem = virtiotest.NewMemory(t, ramBase, int(rings)+2<<20)
	r.data = ramBase + rings
	r.use(d)
	r.activate()
	return r
}

// activate starts the device, whose queues are at the beginning of the memory.
func (r *rig) activate() {
	t := r.t
	t.Helper()
	at := uint64(ramBase)
	for _, q := range r.queues {
		d := virtiotest.NewDriver(t, r.mem, at, q.MaxSize(), r.features)
		d.Start(q)
		r.drivers = append(r.drivers, d)
		at += virtiotest.RingBytes(queueSize)
	}
	check(t, r.d.Activate(r.features, r.queues, r))
	t.Cleanup(func() { r.d.Reset(); check(t, r.d.Close()) })
}

func (r *rig) newDevice(b net.Backend) {
	r.t.Helper()
	r.newDeviceWith(net.Config{Backend: b, MAC: guestMAC, MTU: 1500})
}

func (r *rig) newDeviceWith(c net.Config) {
	r.t.Helper()
	r.changed, r.broken, r.logged = make(chan struct{}, 64), make(chan error, 64), make(chan string, 64)
	c.Log = virtiotest.Log(r.t, r.logged)
	d, err := net.New(c)
	check(r.t, err)
	r.use(d)
}

// use makes queues for a device.
func (r *rig) use(d *net.Device) {
	r.d, r.queues, r.irq = d, nil, nil
	for _, size := range d.QueueSizes() {
		irq := make(chan struct{}, 1)
		r.irq = append(r.irq, irq)
		r.queues = append(r.queues, virtio.NewQueue(r.mem, size, func() {
			select {
			case irq <- struct{}{}:
			default:
			}
		}))
	}
}

func (r *rig) ConfigChanged()       { r.changed <- struct{}{} }
func (r *rig) NeedsReset(err error) { r.broken <- err }

// next waits for a request to come back.
func (r *rig) next(queue int) virtiotest.Used {
	r.t.Helper()
	for {
		if u, ok := r.drivers[queue].Used(); ok {
			return u
		}
		select {
		case <-r.irq[queue]:
		case err := <-r.broken:
			r.t.Fatalf("the device needs a reset: %v", err)
		case <-time.After(10 * time.Second):
			r.t.Fatalf("queue %d does not answer", queue)
		}
	}
}

func (r *rig) add(queue int, readable, writable []virtiotest.Buffer) {
	r.t.Helper()
	if _, ok := r.drivers[queue].Add(readable, writable); !ok {
		r.t.Fatalf("queue %d is full", queue)
	}
	r.queues[queue].Signal()
}

// send has the guest send a frame, cut into two buffers.
func (r *rig) send(pair int, p []byte) {
	r.t.Helper()
	check(r.t, r.mem.WriteAt(p, r.data))
	cut := uint32(min(len(p), net.HeaderBytes))
	r.add(2*pair+1, []virtiotest.Buffer{{GPA: r.data, Len: cut}, {GPA: r.data + uint64(cut), Len: uint32(len(p)) - cut}}, nil)
	r.next(2*pair + 1)
}

// command sends a control command and returns the answer.
func (r *rig) command(class, command byte, data ...byte) byte {
	r.t.Helper()
	q := len(r.queues) - 1
	if r.features&net.FeatureMultiQueue == 0 {
		q = 2
	}
	at := r.data + 1<<20
	check(r.t, r.mem.WriteAt(append([]byte{class, command}, data...), at))
	check(r.t, r.mem.WriteAt([]byte{77}, at+4096))
	r.add(q, []virtiotest.Buffer{{GPA: at, Len: 2}, {GPA: at + 2, Len: uint32(len(data))}}, []virtiotest.Buffer{{GPA: at + 4096, Len: 1}})
	if u := r.next(q); u.Len != 1 {
		r.t.Errorf("an answer of %d bytes", u.Len)
	}
	return r.bytes(at+4096, 1)[0]
}

func (r *rig) bytes(gpa, n uint64) []byte {
	r.t.Helper()
	p := make([]byte, n)
	check(r.t, r.mem.ReadAt(p, gpa))
	return p
}

func (r *rig) status() uint16 {
	var p [2]byte
	r.d.ReadConfig(6, p[:])
	return binary.LittleEndian.Uint16(p[:])
}

// frame makes a frame of n bytes behind an empty header.
func frame(n int) []byte {
	p := make([]byte, net.HeaderBytes+n)
	for i := range n {
		p[net.HeaderBytes+i] = byte(i*7 + n)
	}
	return p
}

func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return c
}

var check = testenv.Check
