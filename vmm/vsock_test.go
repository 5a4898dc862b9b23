package vmm

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
		m.mmio.Read(pci.ECAMBase+uint64(slot)<<15, id[:])
		if binary.LittleEndian.Uint32(id[:]) == (0x1040+uint32(virtio.IDVsock))<<16|0x1af4 {
			return slot
		}
	}
	return -1
}

func (d *vsockDriver) base() uint64 {
	var b [8]byte
	at := pci.ECAMBase + uint64(vsockSlot(d.m))<<15 + 0x10
	d.m.mmio.Read(at, b[:4])
	d.m.mmio.Read(at+4, b[4:])
	return binary.LittleEndian.Uint64(b[:]) &^ 0xf
}

func (d *vsockDriver) write(reg uint64, v uint64, bytes int) {
	d.m.mmio.Write(d.base()+reg, binary.LittleEndian.AppendUint64(nil, v)[:bytes])
}

func (d *vsockDriver) status() byte {
	var b [1]byte
	d.m.mmio.Read(d.base()+regStatus, b[:])
	return b[0]
}

// start is section 3.1.1, with one buffer in the receive queue and one in the
// event queue.
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

// used waits for the buffer of a queue, and returns what is in it.
func (d *vsockDriver) used(queue int) []byte {
	d.t.Helper()
	for deadline := within(d.t); ; time.Sleep(time.Millisecond) {
		if u, ok := d.drivers[queue].Used(); ok {
			return d.drivers[queue].Bytes(vsockGive+uint64(queue)<<12, uint64(u.Len))
		}
		check(d.t, deadline.Err())
	}
}

// say connects to a socket device of a VM and asks for a port of the guest.
func say(t *testing.T, path string, port int) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	check(t, err)
	t.Cleanup(func() { _ = c.Close() })
	check(t, c.SetDeadline(time.Now().Add(patience)))
	_, err = fmt.Fprintf(c, "CONNECT %d\n", port)
	check(t, err)
	return c
}

// closed expects that a connection ends, with nothing said on it.
func closed(t *testing.T, c net.Conn) {
	t.Helper()
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Fatalf("%q, %v; expected was the end", b, err)
	}
}

func withVsock(t *testing.T, path string) Config {
	cfg := testConfig(1, obey)
	cfg.Devices.Vsock = &vsock.Config{CID: 77, Path: path}
	cfg.Logf = t.Logf
	return cfg
}

// TestVsock: the device is on the bus, its socket is there from then on and a
// client is refused while there is no driver. Through a migration, to the same
// path, the state travels and the socket follows; the guest is told that its
// connections are gone.
func TestVsock(t *testing.T) {
	needKVM(t)
	path := filepath.Join(t.TempDir(), "v")
	cfg := withVsock(t, path)
	con := newTape()
	cfg.Serial = con
	vm, err := NewVM(cfg)
	check(t, err)
	r := run(t, vm, con)
	con.await(t, "B")
	if slot := vsockSlot(vm.machine); slot != 1 {
		t.Fatalf("the socket device is in slot %d", slot)
	}
	closed(t, say(t, path, 1))

	if _, err := NewVM(withVsock(t, path)); err == nil || !strings.Contains(err.Error(), "vsock "+path+": listen: another process listens there") {
		t.Fatalf("a second VM with the socket: %v", err)
	}

	d := startVsockDriver(t, vm.machine)
	c := say(t, path, 1234)
	packet := d.used(0)
	if dst, op := binary.LittleEndian.Uint64(packet[8:]), binary.LittleEndian.Uint16(packet[30:]); dst != 77 || op != 1 {
		t.Fatalf("a packet for CID %d, operation %d", dst, op)
	}

	next := receiving(t, ReceiveConfig{})
	if res := r.migrateTo(t, next.Addr().String()); res.Status != "completed" {
		t.Fatalf("%+v", res)
	}
	r.ends(t, Migrated, "")
	closed(t, c)
	d.m = next.machine
	if s := d.status(); s != 1|2|4|8 {
		t.Errorf("status %#x at the destination", s)
	}
	// The event queue's used index is 1 now, and the buffer has the event.
	for deadline := within(t); word(t, d.m, d.drivers[2].State().Device)>>16 != 1; time.Sleep(time.Millisecond) {
		check(t, deadline.Err())
	}
	if event := word(t, d.m, vsockGive+2<<12); event != 0 {
		t.Errorf("event %d", event)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the socket has not followed: %v", err)
	}
}

// TestVsockOverride: only the path is this host's to say.
func TestVsockOverride(t *testing.T) {
	guest := Devices{Vsock: &vsock.Config{CID: 77, Path: "/there"}}
	check(t, guest.overrideVsock(nil))
	check(t, guest.overrideVsock(&vsock.Config{Path: "/here"}))
	check(t, guest.overrideVsock(&vsock.Config{CID: 77, Path: "/here"}))
	if *guest.Vsock != (vsock.Config{CID: 77, Path: "/here"}) || guest.String() != "vsock cid 77" {
		t.Errorf("%v, %v", guest.Vsock, &guest)
	}
	for _, c := range []struct {
		guest Devices
		here  vsock.Config
		says  string
	}{
		{guest, vsock.Config{CID: 78, Path: "/x"}, "vsock /x: the CID is the guest's and cannot change when it moves; it is 77"},
		{Devices{}, vsock.Config{Path: "/x"}, "vsock /x: the guest has no socket device"},
	} {
		if err := c.guest.overrideVsock(&c.here); err == nil || err.Error() != c.says {
			t.Errorf("error %v, want %q", err, c.says)
		}
	}
	bad := Devices{Vsock: &vsock.Config{CID: 2, Path: "/x"}}
	if errs := bad.validate(); len(errs) != 1 || !strings.Contains(errs[0].Error(), "vsock /x: cid 2") {
		t.Errorf("%v", errs)
	}
}
