package transport_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/transport"
	"github.com/govmm/govmm/virtio/virtiotest"
	"golang.org/x/sys/unix"
)

const (
	ramBase = 0x100000
	// The registers are where the bus puts the first function's BARs.
	common = 0xc0000000
	isr    = common + 0x1000
	device = common + 0x2000
	notify = common + 0x3000
	table  = common + 0x4000
)

var check = testenv.Check

// board is what a transport is plugged into: interrupts and ioeventfds.
type board struct {
	boardMu sync.Mutex        // guards the maps
	arrived map[uint32]uint64 // how many messages of each data
	places  map[uint64]int
	refuse  error
}

func newBoard() *board {
	return &board{arrived: map[uint32]uint64{}, places: map[uint64]int{}}
}

func (b *board) SignalMSI(_ uint64, data uint32) error {
	b.boardMu.Lock()
	defer b.boardMu.Unlock()
	b.arrived[data]++
	return nil
}

func (b *board) AssignIOEventFD(gpa uint64, fd int) error {
	b.boardMu.Lock()
	defer b.boardMu.Unlock()
	if b.refuse != nil {
		return b.refuse
	}
	if _, taken := b.places[gpa]; taken {
		return errors.New("taken")
	}
	b.places[gpa] = fd
	return nil
}

func (b *board) DeassignIOEventFD(gpa uint64, fd int) error {
	b.boardMu.Lock()
	defer b.boardMu.Unlock()
	if b.places[gpa] != fd {
		return fmt.Errorf("no ioeventfd at %#x", gpa)
	}
	delete(b.places, gpa)
	return nil
}

func (b *board) ioeventfd(gpa uint64) (int, bool) {
	b.boardMu.Lock()
	defer b.boardMu.Unlock()
	fd, ok := b.places[gpa]
	return fd, ok
}

// taken returns how many messages arrived since it was last asked.
func (b *board) taken(data uint32) uint64 {
	b.boardMu.Lock()
	defer b.boardMu.Unlock()
	n := b.arrived[data]
	delete(b.arrived, data)
	return n
}

// interrupt waits for a message.
func (b *board) interrupt(t testing.TB, data uint32) {
	t.Helper()
	for deadline := time.Now().Add(testenv.Patience); b.taken(data) == 0; time.Sleep(50 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("message %#x did not come", data)
		}
	}
}

// guest is a machine with an echo device of two queues, and the driver's side.
type guest struct {
	t      testing.TB
	board  *board
	mem    *virtiotest.Memory
	bus    *pci.Bus
	echo   *virtiotest.Echo
	device *transport.Transport
	logs   chan string
}

const queueSize = 8

func newGuest(t testing.TB) *guest {
	t.Helper()
	return newGuestWith(t, virtiotest.NewMemory(t, ramBase, 1<<20))
}

func newGuestWith(t testing.TB, mem *virtiotest.Memory) *guest {
	t.Helper()
	g := &guest{t: t, board: newBoard(), mem: mem, bus: pci.NewBus(), echo: &virtiotest.Echo{Queues: []uint16{queueSize, 2 * queueSize}}, logs: make(chan string, 100)}
	var err error
	var p [1]byte
	g.device, err = transport.New(g.echo, transport.Host{
		Memory: g.mem, Interrupts: g.board, Notifications: g.board,
		Log: virtiotest.Log(t, g.logs),
	})
	check(t, err)
	t.Cleanup(func() {
		g.echo.WriteConfig(0, []byte{0xff})
		check(t, g.device.Close())
		if g.echo.ReadConfig(0, p[:]); p[0] != 0 {
			t.Error("the device was not reset")
		}
		g.board.boardMu.Lock()
		defer g.board.boardMu.Unlock()
		if len(g.board.places) > 0 {
			t.Errorf("left behind: ioeventfds %v", g.board.places)
		}
	})
	_, err = g.bus.Add(1, g.device.Function())
	check(t, err)
	return g
}

func (g *guest) read(addr uint64, n int) uint64 {
	var p [8]byte
	g.bus.MMIO().Read(addr-pci.MMIOBase, p[:n])
	return binary.LittleEndian.Uint64(p[:])
}

func (g *guest) write(addr uint64, n int, v uint64) {
	g.bus.MMIO().Write(addr-pci.MMIOBase, binary.LittleEndian.AppendUint64(nil, v)[:n])
}

func (g *guest) status() uint64 { return g.read(common+20, 1) }

// negotiate goes as far as FEATURES_OK with the features.
func (g *guest) negotiate(features uint64) bool {
	g.write(common+20, 1, 0)
	g.write(common+20, 1, 1)
	g.write(common+20, 1, 3)
	for i := range uint64(2) {
		g.write(common+8, 4, i)
		g.write(common+12, 4, features>>(32*i)&0xffffffff)
	}
	g.write(common+20, 1, 11)
	return g.status() == 11
}

// interrupts turns MSI-X on: message 0x40 for the configuration, 0x41+i for
// queue i.
func (g *guest) interrupts() {
	for i := range uint64(3) {
		g.write(table+16*i, 4, 0xfee00000)
		g.write(table+16*i+8, 4, 0x40+i)
		g.write(table+16*i+12, 4, 0)
	}
	g.setConfig(0x42, 2, 0x8000)
	g.write(common+16, 2, 0)
	for i := range uint64(2) {
		g.write(common+22, 2, i)
		g.write(common+26, 2, i+1)
	}
}

func (g *guest) setConfig(reg, n int, v uint32) {
	g.bus.ECAM().Write(uint64(1<<15|reg), binary.LittleEndian.AppendUint32(nil, v)[:n])
}

func (g *guest) config(reg, n int) uint32 {
	var p [4]byte
	g.bus.ECAM().Read(uint64(1<<15|reg), p[:n])
	return binary.LittleEndian.Uint32(p[:])
}

// setQueue gives a queue to the device.
func (g *guest) setQueue(i int, s virtio.QueueState) {
	g.write(common+22, 2, uint64(i))
	g.write(common+24, 2, uint64(s.Size))
	for off, v := range map[uint64]uint64{32: s.Desc, 40: s.Driver, 48: s.Device} {
		g.write(common+off, 4, v&0xffffffff)
		g.write(common+off+4, 4, v>>32)
	}
	g.write(common+28, 2, 1)
}

// queueGPA is where the driver of queue i has its ring; its buffers follow.
func (g *guest) queueGPA(i int) uint64 { return ramBase + uint64(i)<<18 }

// start brings the device up and returns the drivers of its queues.
func (g *guest) start(features uint64) [2]*virtiotest.Driver {
	g.t.Helper()
	if !g.negotiate(features) {
		g.t.Fatalf("features %#x: status %#x", features, g.status())
	}
	g.interrupts()
	var d [2]*virtiotest.Driver
	for i := range d {
		d[i] = virtiotest.NewDriver(g.t, g.mem, g.queueGPA(i), queueSize, features)
		g.setQueue(i, d[i].State())
	}
	g.write(common+20, 1, 15)
	if g.status() != 15 {
		g.t.Fatalf("status %#x, want DRIVER_OK", g.status())
	}
	return d
}

// kick notifies queue i, as the kernel or as an exit would.
func (g *guest) kick(i int) {
	g.t.Helper()
	at := uint64(notify + 4*i)
	if fd, ok := g.board.ioeventfd(at); ok {
		if _, err := unix.Write(fd, binary.NativeEndian.AppendUint64(nil, 1)); err != nil {
			g.t.Fatal(err)
		}
		return
	}
	g.write(at, 2, uint64(i))
}

// echoed sends a request through queue i and checks the answer. wait waits for
// the queue's interrupt.
func (g *guest) echoed(d *virtiotest.Driver, i int, text string, wait func()) {
	g.t.Helper()
	g.request(d, i, text)
	g.kick(i)
	g.answered(d, i, text, wait)
}

func (g *guest) request(d *virtiotest.Driver, i int, text string) {
	g.t.Helper()
	buf := g.queueGPA(i) + virtiotest.RingBytes(queueSize)
	check(g.t, g.mem.WriteAt([]byte(text), buf))
	clear(d.Bytes(buf+0x1000, 0x100))
	n := uint32(len(text))
	if _, ok := d.Add([]virtiotest.Buffer{{GPA: buf, Len: n}}, []virtiotest.Buffer{{GPA: buf + 0x1000, Len: n + 5}}); !ok {
		g.t.Fatal("the ring is full")
	}
}

func (g *guest) answered(d *virtiotest.Driver, i int, text string, wait func()) {
	g.t.Helper()
	wait()
	u, ok := d.Used()
	for ; !ok; u, ok = d.Used() {
		wait() // an interrupt without a request, which a driver must accept
	}
	buf := g.queueGPA(i) + virtiotest.RingBytes(queueSize) + 0x1000
	if got := string(d.Bytes(buf, uint64(u.Len))); got != text {
		g.t.Fatalf("queue %d answered %q, want %q", i, got, text)
	}
}

func (g *guest) interrupted(i int) func() {
	return func() { g.t.Helper(); g.board.interrupt(g.t, uint32(0x41+i)) }
}

const allFeatures = virtio.FeatureVersion1 | virtio.RingFeatures | virtio.FeatureRingReset | 1
