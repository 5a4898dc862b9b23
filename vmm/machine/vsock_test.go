package machine

import (
	"encoding/binary"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/virtiotest"
	"github.com/govmm/govmm/virtio/vsock"
)

// vsockDriver drives a machine's socket device from outside: it writes the
// registers and the rings that a guest's driver writes, in memory that the
// guest leaves alone.
type vsockDriver struct {
	t       *testing.T
	m       *Machine
	drivers []*virtiotest.Driver
}

// Registers of the common configuration (virtio 1.2, 4.1.4.3), in the first
// page of the device's BAR.
const (
	regDriverSelect = 8
	regDriver       = 12
	regStatus       = 20
	regQueueSelect  = 22
	regQueueSize    = 24
	regQueueEnable  = 28
	regQueueDesc    = 32
	regNotify       = 0x3000

	vsockRings = 8 << 20 // where the rings are
	vsockGive  = 12 << 20
)

// vsockSlot returns the slot of the socket device, -1 if there is none.
func vsockSlot(m *Machine) int {
	for slot := range pci.Slots {
		var id [4]byte
		m.board.mmio.Read(pci.ECAMBase+uint64(slot)<<15, id[:])
		if binary.LittleEndian.Uint32(id[:]) == (0x1040+uint32(virtio.IDVsock))<<16|0x1af4 {
			return slot
		}
	}
	return -1
}

func (d *vsockDriver) base() uint64 { return deviceBase(d.m, vsockSlot(d.m)) }

func (d *vsockDriver) write(reg uint64, v uint64, bytes int) {
	d.m.board.mmio.Write(d.base()+reg, binary.LittleEndian.AppendUint64(nil, v)[:bytes])
}

func (d *vsockDriver) status() byte {
	var b [1]byte
	d.m.board.mmio.Read(d.base()+regStatus, b[:])
	return b[0]
}

// startVsockDriver starts the device (virtio 1.2, 3.1.1), with one buffer in the
// receive queue and one in the event queue.
func startVsockDriver(t *testing.T, m *Machine) *vsockDriver {
	t.Helper()
	d := &vsockDriver{t: t, m: m}
	d.write(regStatus, 0, 1)
	d.write(regStatus, 1|2, 1)
	features := virtio.FeatureVersion1 | vsock.FeatureStream
	for i := range uint64(2) {
		d.write(regDriverSelect, i, 4)
		d.write(regDriver, features>>(32*i), 4)
	}
	d.write(regStatus, 1|2|8, 1)
	const size = 16
	for i := range uint64(3) {
		q := virtiotest.NewDriver(t, m.mem, vsockRings+i*virtiotest.RingBytes(size), size, features)
		d.drivers = append(d.drivers, q)
		s := q.State()
		d.write(regQueueSelect, i, 2)
		d.write(regQueueSize, size, 2)
		for j, gpa := range []uint64{s.Desc, s.Driver, s.Device} {
			d.write(regQueueDesc+8*uint64(j), gpa, 4)
			d.write(regQueueDesc+8*uint64(j)+4, gpa>>32, 4)
		}
		d.write(regQueueEnable, 1, 2)
	}
	for _, i := range []int{0, 2} { // rx, event
		copy(d.drivers[i].Bytes(vsockGive+uint64(i)<<12, 4), "\xff\xff\xff\xff")
		if _, ok := d.drivers[i].Add(nil, []virtiotest.Buffer{{GPA: vsockGive + uint64(i)<<12, Len: 4096}}); !ok {
			t.Fatal("the ring is full")
		}
	}
	d.write(regStatus, 1|2|4|8, 1)
	for i := range uint64(3) {
		d.write(regNotify+4*i, i, 2)
	}
	if s := d.status(); s != 1|2|4|8 {
		t.Fatalf("status %#x", s)
	}
	return d
}

// used waits until the device has used the buffer of a queue, and returns its content.
func (d *vsockDriver) used(queue int) []byte {
	d.t.Helper()
	for deadline := vmtest.Within(d.t); ; time.Sleep(time.Millisecond) {
		if u, ok := d.drivers[queue].Used(); ok {
			return d.drivers[queue].Bytes(vsockGive+uint64(queue)<<12, uint64(u.Len))
		}
		check(d.t, deadline.Err())
	}
}

// TestVsock: the device is on the bus, and its socket is there as soon as the machine
// may run. A client is refused while the guest has no driver. At the destination the
// socket has the same path, the device's state is there, and the guest is told that
// its connections are gone.
func TestVsock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v")
	spec := testSpec(t, 1, vmtest.Obey, &vsock.Spec{Config: vsock.Config{CID: 77, Path: path}})
	con := vmtest.NewTape()
	m := fromSpec(t, spec, con)
	check(t, m.Boot())
	check(t, m.Start(false))
	con.Await(t, "B")
	if slot := vsockSlot(m); slot != 1 {
		t.Fatalf("the socket device is in slot %d", slot)
	}
	vmtest.ExpectEnd(t, vmtest.Connect(t, path, 1))

	d := startVsockDriver(t, m)
	c := vmtest.Connect(t, path, 1234)
	packet := d.used(0)
	if dst, op := binary.LittleEndian.Uint64(packet[8:]), binary.LittleEndian.Uint16(packet[30:]); dst != 77 || op != 1 {
		t.Fatalf("a packet for CID %d, operation %d", dst, op)
	}

	src, to := handOver(t, m)
	if err := to.Start(vmtest.Within(t), false); err == nil || !strings.Contains(err.Error(), "vsock "+path+": listen: another process listens there") {
		t.Fatalf("a second machine with the socket: %v", err)
	}
	check(t, src.ResumeAfterAbort(vmtest.Within(t)))
	src, to = handOver(t, m)
	check(t, src.YieldForHandoff(vmtest.Within(t)))
	check(t, to.Start(vmtest.Within(t), false))
	check(t, m.Close())
	vmtest.ExpectEnd(t, c)
	d.m = to.Machine
	if s := d.status(); s != 1|2|4|8 {
		t.Errorf("status %#x at the destination", s)
	}
	// The event queue's used index is 1 now, and the buffer has the event.
	for deadline := vmtest.Within(t); word(t, d.m, d.drivers[2].State().Device)>>16 != 1; time.Sleep(time.Millisecond) {
		check(t, deadline.Err())
	}
	if event := word(t, d.m, vsockGive+2<<12); event != 0 {
		t.Errorf("event %d", event)
	}
}
