// Package transporttest gives fuzz targets of devices all that a guest can do to one:
// accesses to configuration space and registers, rings of both formats and requests,
// resets of queues and of the device, and moves to another host, in any order.
package transporttest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/transport"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// Device is what a kind of device brings to [Fuzz].
type Device struct {
	// New makes a fresh device whose guest memory is mem: RAM from gpa [Base] on.
	// If it is an io.Closer, it is closed.
	New func(t testing.TB, mem *virtiotest.Memory) virtio.Device
	// Host does something on the host's side of the device. It does not wait. It
	// may be nil.
	Host func(t testing.TB, d virtio.Device, what byte, value uint16)
	// Requests are good requests of a queue: readable bytes, and room for an answer.
	// They are seeds.
	Requests []Request
}

// Request is a request that a driver may make.
type Request struct {
	Queue    int
	Readable []byte
	Writable uint8 // in 64 bytes
}

const (
	// Base and Size are guest memory in bytes. Rings lie in the first half.
	Base = 0x100000
	Size = 256 << 10

	ringSpace  = 16 << 10 // of a queue that is set up with manners
	dataSpace  = Base + Size/2
	mostOps    = 48
	mostQueues = 8
)

// What an input's first byte of four chooses.
const (
	opConfig = iota
	opReadConfig
	opWrite
	opRead
	opMemory
	opStart
	opRequest
	opKick
	opResetQueue
	opReset
	opPause
	opMove
	opHost
	opWait
	opPlace
	ops
)

// Fuzz adds seeds and fuzzes. Whatever the guest does: there is no panic, each pause,
// reset and move comes to an end, no chain is out afterwards, a state that was saved
// loads, and each page that the device has written is marked.
func Fuzz(f *testing.F, d Device) {
	for _, features := range []byte{0, 1, 2, 3} {
		in := []byte{opStart, features, 3, 0}
		for _, r := range d.Requests {
			in = append(in, opRequest, byte(r.Queue), byte(len(r.Readable)), r.Writable)
			in = append(in, r.Readable...)
		}
		f.Add(in)
		f.Add(append(in, opWait, 0, 0, 0, opHost, 1, 2, 3, opMove, 0, 0, 0, opMove, 1, 0, 0, 60, 0, 1, opHost, 0, 1, 0, opResetQueue, 0, 0, 0, opPause, 0, 0, 0, opWait, 0, 0, 0, opReset, 0, 0, 0))
	}
	mem := virtiotest.NewMemory(f, Base, Size)
	f.Fuzz(func(t *testing.T, in []byte) {
		all, err := mem.Slice(Base, Size)
		testenv.Check(t, err)
		clear(all)
		before := mem.Snapshot()
		g := &guest{t: t, kind: d, mem: mem}
		watchdog := time.AfterFunc(testenv.Patience, func() {
			stacks := make([]byte, 1<<20)
			fmt.Fprintf(os.Stderr, "%x does not come to an end\n%s\n", in, stacks[:runtime.Stack(stacks, true)])
			os.Exit(2)
		})
		defer watchdog.Stop()
		g.plug()
		for n := 0; len(in) >= 4 && n < mostOps; n++ {
			in = in[4+g.step(in[0], in[1], binary.LittleEndian.Uint16(in[2:]), in[4:]):]
		}
		g.pause()
		if lost := mem.Unmarked(before); len(lost) > 0 {
			t.Errorf("the device has written pages %#x and not marked them", lost)
		}
		g.move(nil)
		g.unplug()
	})
}

// guest is a device on a bus, and its driver.
type guest struct {
	t      testing.TB
	kind   Device
	mem    *virtiotest.Memory
	dev    virtio.Device
	bus    *pci.Bus
	card   *transport.Transport
	base   uint64 // of the registers
	packed bool
	rings  [mostQueues]ring
}

// ring is where the driver goes on in a queue.
type ring struct {
	size, next int
	wrap       bool
}

func (g *guest) plug() {
	g.t.Helper()
	g.dev = g.kind.New(g.t, g.mem)
	var err error
	b := &board{}
	g.card, err = transport.New(g.dev, transport.Host{Memory: g.mem, Interrupts: b, Notifications: b})
	testenv.Check(g.t, err)
	g.bus, g.base = pci.NewBus(), pci.MMIOBase
	_, err = g.bus.Add(1, g.card.Function())
	testenv.Check(g.t, err)
}

func (g *guest) unplug() {
	g.t.Helper()
	testenv.Check(g.t, g.card.Close())
	if c, ok := g.dev.(io.Closer); ok {
		_ = c.Close() // what it held of the host is of no interest
	}
}

// step does what four bytes say, and returns how many of rest it has used.
func (g *guest) step(op, a byte, v uint16, rest []byte) int {
	width, region := 1<<(op>>6), uint64(op>>4&3)<<12 // common, ISR, device, notify
	wide := uint64(v) | uint64(v)<<16 | uint64(a)<<32
	switch op & 0xf % ops {
	case opConfig:
		g.config(uint64(a), min(width, 4), uint32(wide))
	case opReadConfig:
		var p [4]byte
		g.bus.ECAM().Read(1<<15+uint64(a), p[:min(width, 4)])
	case opWrite:
		if region == 1<<12 {
			region = 4 << 12 // the MSI-X table: writes of the ISR do nothing
		}
		g.write(region+uint64(a), width, wide)
	case opRead:
		var p [8]byte
		g.bus.MMIO().Read(g.base-pci.MMIOBase+region+uint64(a), p[:width])
	case opMemory:
		n := min(1+int(a%32), len(rest))
		_ = g.mem.WriteAt(rest[:n], Base+uint64(v)*4) // RAM, unless it is the last bytes
		return n
	case opStart:
		g.start(a, v)
	case opRequest:
		n := min(int(v&0xff), len(rest))
		g.request(int(a), rest[:n], uint32(v>>8)*64)
		return n
	case opKick:
		g.kick(int(a % mostQueues))
	case opResetQueue:
		g.write(22, 2, uint64(a%mostQueues))
		g.write(58, 2, 1)
		if v&1 != 0 {
			g.setQueue(int(a%mostQueues), v>>1)
		}
	case opReset:
		g.write(20, 1, 0)
	case opPause:
		g.pause()
		_ = g.card.Resume() // that it cannot go on, the driver learns
	case opMove:
		n := min(3*int(a%8), len(rest)/3*3)
		g.pause()
		g.move(rest[:n])
		return n
	case opHost:
		if g.kind.Host != nil {
			g.kind.Host(g.t, g.dev, a, v)
		}
	case opWait:
		time.Sleep(100 * time.Microsecond) // the device works
	case opPlace:
		g.base = pci.MMIOBase + uint64(v)<<13%pci.MMIOSize
		g.config(0x10, 4, uint32(g.base))
		g.config(4, 2, uint32(6&^(a&2)))
	}
	return 0
}

func (g *guest) config(reg uint64, n int, v uint32) {
	var p [4]byte
	binary.LittleEndian.PutUint32(p[:], v)
	g.bus.ECAM().Write(1<<15+reg, p[:n])
}

func (g *guest) write(off uint64, n int, v uint64) {
	var p [8]byte
	binary.LittleEndian.PutUint64(p[:], v)
	g.bus.MMIO().Write(g.base-pci.MMIOBase+off, p[:n])
}

// start brings the device up. what chooses the ring's format and features that are
// left out; sizes the queues' size.
func (g *guest) start(what byte, sizes uint16) {
	g.write(20, 1, 0)
	g.write(20, 1, 3)
	features := g.dev.Features() | virtio.RingFeatures | virtio.FeatureVersion1 | virtio.FeatureRingReset
	if what&1 != 0 {
		features &^= virtio.FeatureRingPacked
	}
	if what&2 != 0 {
		features &^= virtio.FeatureEventIdx
	}
	features &^= uint64(what >> 2) // features of the device
	g.packed = features&virtio.FeatureRingPacked != 0
	for i := range uint64(2) {
		g.write(8, 4, i)
		g.write(12, 4, features>>(32*i)&0xffffffff)
	}
	g.write(20, 1, 11)
	g.config(0x42, 2, 0x8000) // MSI-X
	for i := range min(len(g.dev.QueueSizes()), mostQueues) {
		g.write(4<<12+uint64(16*i)+12, 4, 0)
		g.setQueue(i, sizes)
	}
	g.write(20, 1, 15)
}

func (g *guest) setQueue(i int, sizes uint16) {
	at := uint64(Base + i*ringSpace)
	b, err := g.mem.Slice(at, ringSpace)
	testenv.Check(g.t, err)
	clear(b)
	g.rings[i] = ring{size: 8 << (sizes % 4), wrap: true}
	g.write(22, 2, uint64(i))
	g.write(24, 2, uint64(g.rings[i].size))
	g.write(26, 2, uint64(i))
	for j := range uint64(3) {
		g.write(32+8*j, 4, at+4096*j)
		g.write(36+8*j, 4, 0)
	}
	g.write(28, 2, 1)
}

// request makes a request of one or two buffers available, as a driver with manners
// does that does not wait for answers, and kicks. The bits above the queue's number
// choose where the readable bytes end up and whether they are in two parts.
func (g *guest) request(a int, readable []byte, writable uint32) {
	i := a % mostQueues
	r := &g.rings[i]
	if r.size == 0 {
		return
	}
	at := uint64(dataSpace + i*8192)
	testenv.Check(g.t, g.mem.WriteAt(readable, at))
	var parts []virtiotest.Buffer
	n := uint32(len(readable))
	if cut := min(uint32(a>>3), n); cut > 0 && n > cut {
		parts = append(parts, virtiotest.Buffer{GPA: at, Len: cut})
		at, n = at+uint64(cut), n-cut
	}
	if n > 0 {
		parts = append(parts, virtiotest.Buffer{GPA: at, Len: n})
	}
	toRead := len(parts)
	if writable > 0 {
		parts = append(parts, virtiotest.Buffer{GPA: dataSpace + 64<<10, Len: writable})
	}
	g.add(uint64(Base+i*ringSpace), r, parts, toRead)
	g.kick(i)
}

// add fills descriptors from the ring's next place on.
func (g *guest) add(at uint64, r *ring, parts []virtiotest.Buffer, toRead int) {
	const flagNext, flagWrite = 1, 2
	if len(parts) == 0 {
		return
	}
	head := r.next
	for i, p := range parts {
		place := (head + i) % r.size
		flags := uint16(0)
		if i < len(parts)-1 {
			flags |= flagNext
		}
		if i >= toRead {
			flags |= flagWrite
		}
		b := binary.LittleEndian.AppendUint64(nil, p.GPA)
		b = binary.LittleEndian.AppendUint32(b, p.Len)
		if g.packed {
			if r.wrap != (head+i >= r.size) {
				flags |= 1 << 7
			} else {
				flags |= 1 << 15
			}
			b = binary.LittleEndian.AppendUint16(b, uint16(head))
			b = binary.LittleEndian.AppendUint16(b, flags)
		} else {
			b = binary.LittleEndian.AppendUint16(b, flags)
			b = binary.LittleEndian.AppendUint16(b, uint16((place+1)%r.size))
		}
		testenv.Check(g.t, g.mem.WriteAt(b, at+uint64(16*place)))
	}
	if g.packed {
		if head+len(parts) >= r.size {
			r.wrap = !r.wrap
		}
		r.next = (head + len(parts)) % r.size
		return
	}
	// The available ring's index is in guest memory only.
	var index [2]byte
	testenv.Check(g.t, g.mem.ReadAt(index[:], at+4096+2))
	n := binary.LittleEndian.Uint16(index[:])
	testenv.Check(g.t, g.mem.WriteAt(binary.LittleEndian.AppendUint16(nil, uint16(head)), at+4096+4+2*uint64(int(n)%r.size)))
	testenv.Check(g.t, g.mem.WriteAt(binary.LittleEndian.AppendUint16(nil, n+1), at+4096+2))
	r.next = (head + len(parts)) % r.size
}

func (g *guest) kick(i int) { g.write(3<<12+uint64(4*i), 2, uint64(i)) }

func (g *guest) pause() {
	g.t.Helper()
	testenv.Check(g.t, g.card.Pause(context.Background()))
}

// move takes the device, which is paused, to another host. Three bytes of changes say
// which byte of its state a hostile source changes, and how; a device whose state is
// refused moves as it is.
func (g *guest) move(changes []byte) {
	g.t.Helper()
	good, err := g.card.SaveState()
	testenv.Check(g.t, err)
	raw, err := strictcbor.Marshal(good)
	testenv.Check(g.t, err)
	for ; len(changes) >= 3; changes = changes[3:] {
		raw[int(binary.LittleEndian.Uint16(changes))%len(raw)] ^= changes[2]
	}
	var s transport.State
	if strictcbor.Unmarshal(raw, &s) != nil {
		s = good
	}
	g.unplug()
	base := g.base
	g.plug()
	g.base = base
	if g.card.LoadState(s) != nil {
		g.unplug()
		g.plug()
		testenv.Check(g.t, g.card.LoadState(good))
	}
	_ = g.card.Resume() // that it cannot go on, the driver learns
}

// board is a machine without interrupts.
type board struct{}

var errNoIOEventFD = errors.New("no ioeventfds here")

func (b *board) SignalMSI(uint64, uint32) error      { return nil }
func (b *board) AssignIOEventFD(uint64, int) error   { return errNoIOEventFD }
func (b *board) DeassignIOEventFD(uint64, int) error { return nil }
