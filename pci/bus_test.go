package pci_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/govmm/govmm/pci"
)

var testID = pci.Identity{Vendor: 0x1af4, Device: 0x107f, SubVendor: 0x1af4, SubDevice: 0x1234, Class: 0x0180ff, Revision: 7}

// newDevice puts a function with a wide BAR of 16 KiB at 0, and MSI-X at 2, in
// slot 3.
func newDevice(t testing.TB, c *controller) (guest, *pci.Function, *pci.MSIX, *scratch) {
	t.Helper()
	b := pci.NewBus()
	f := pci.NewFunction(testID)
	s := &scratch{bytes: make([]byte, 0x4000)}
	check(t, f.AddBAR(0, pci.BAR{Size: 0x4000, Wide: true, Region: s, Moved: s.moved}))
	m, err := f.AddMSIX(2, 3, c, func(err error) { t.Log(err) })
	check(t, err)
	slot, err := b.Add(3, f)
	if check(t, err); slot != 3 {
		t.Fatalf("slot %d", slot)
	}
	return guest{t, b}, f, m, s
}

func TestConfigSpace(t *testing.T) {
	g, _, _, _ := newDevice(t, newController(t))
	for _, tt := range []struct {
		slot, reg, n int
		want         uint32
	}{
		{0, 0, 4, 0x00081b36}, {0, 8, 4, 0x06000000}, {0, 0x0e, 1, 0},
		{3, 0, 2, 0x1af4}, {3, 2, 2, 0x107f}, {3, 8, 4, 0x0180ff07}, {3, 0x2c, 4, 0x12341af4},
		{3, 4, 2, 2}, {3, 6, 2, 0x10}, {3, 0x34, 1, 0x40}, {3, 0x40, 2, 0x11}, {3, 0x42, 2, 2}, {3, 0x44, 4, 2}, {3, 0x48, 4, 0x1002},
		{3, 0x3d, 1, 0}, {1, 0, 4, 0xffffffff}, {31, 0x10, 2, 0xffff},
	} {
		if got := g.config(tt.slot, tt.reg, tt.n); got != tt.want {
			t.Errorf("slot %d register %#x: %#x, want %#x", tt.slot, tt.reg, got, tt.want)
		}
	}
	// Writes change only what is not read-only.
	before := g.config(3, 0, 4)
	g.setConfig(3, 0, 4, 0xffffffff)
	g.setConfig(3, 0x3c, 1, 0x5a)
	g.setConfig(3, 4, 4, 0xffffffff)
	if g.config(3, 0, 4) != before || g.config(3, 0x3c, 1) != 0x5a || g.config(3, 4, 4) != 0x00100546 {
		t.Errorf("after writes: %#x %#x %#x", g.config(3, 0, 4), g.config(3, 0x3c, 1), g.config(3, 4, 4))
	}
	// Beyond 256 bytes, other functions, other buses.
	for _, off := range []uint64{3<<15 | 0x100, 3<<15 | 1<<12, 3<<15 | 0xfe, 1 << 20} {
		p := make([]byte, 4)
		g.bus.ECAM().Write(off, p)
		if g.bus.ECAM().Read(off, p); !bytes.Equal(p, []byte{0xff, 0xff, 0xff, 0xff}) {
			t.Errorf("ECAM %#x: % x", off, p)
		}
	}
}

// The address register has accesses of 4 bytes; narrower ones are for other devices.
func TestPorts(t *testing.T) {
	g, _, _, _ := newDevice(t, newController(t))
	rest := &scratch{bytes: make([]byte, 8)}
	p := g.bus.Ports(rest)
	p.Write(1, []byte{6}) // the PC's reset control
	if rest.bytes[1] != 6 {
		t.Error("port 0xcf9 was not passed on")
	}
	b := make([]byte, 4)
	p.Write(0, []byte{1, 0, 0, 0x80 | 0x7f})
	if p.Read(0, b); !bytes.Equal(b, []byte{0, 0, 0, 0x80}) {
		t.Errorf("address register % x", b)
	}
	p.Write(0, []byte{0, 0, 0, 0})
	if p.Read(4, b); b[0] != 0xff {
		t.Errorf("a read with the address register off: % x", b)
	}
	p.Write(0, []byte{0, 0x18, 0, 0x80})
	if p.Read(6, b[:2]); b[0] != 0x7f || b[1] != 0x10 {
		t.Errorf("device id % x", b[:2])
	}
	if p.Read(7, b[:2]); b[0] != 0xff {
		t.Errorf("an access over the ports' end: % x", b[:2])
	}
	if p = g.bus.Ports(nil); true {
		p.Write(1, b[:1])
		if p.Read(1, b[:1]); b[0] != 0xff {
			t.Error("something answers at 0xcf9")
		}
	}
}

func TestBARs(t *testing.T) {
	g, f, _, s := newDevice(t, newController(t))
	const slot = 3
	if got := g.config(slot, 0x10, 4); got != 0xc0000004 {
		t.Fatalf("BAR 0 %#x", got)
	}
	if got := g.config(slot, 0x18, 4); got != 0xc0004000 {
		t.Fatalf("BAR 2 %#x", got)
	}
	g.write(0xc0000010, 4, 0x11223344)
	if got := g.read(0xc0000010, 4); got != 0x11223344 {
		t.Errorf("register %#x", got)
	}
	// Drivers size a BAR while decoding is off.
	g.setConfig(slot, 4, 2, 0)
	for reg, want := range map[int]uint32{0x10: 0xffffc004, 0x14: 0xffffffff, 0x18: 0xffffe000, 0x1c: 0, 0x20: 0, 0x24: 0, 0x30: 0} {
		g.setConfig(slot, reg, 4, 0xffffffff)
		if got := g.config(slot, reg, 4); got != want {
			t.Errorf("BAR at %#x sizes as %#x, want %#x", reg, got, want)
		}
	}
	// A BAR can be moved byte by byte; decoding maps it.
	for i, v := range []uint32{0x00, 0x00, 0x00, 0xd0, 0, 0, 0, 0} {
		g.setConfig(slot, 0x10+i, 1, v)
	}
	if got := g.read(0xd0000010, 4); got != 0xffffffff {
		t.Errorf("decoded while decoding is off: %#x", got)
	}
	g.setConfig(slot, 4, 2, 2)
	if got := g.read(0xd0000010, 4); got != 0x11223344 {
		t.Errorf("register at the new place %#x", got)
	}
	if got := g.read(0xc0000010, 4); got != 0xffffffff {
		t.Errorf("register at the old place %#x", got)
	}
	// Outside of the window a BAR is not mapped; inside it is mapped again.
	g.setConfig(slot, 0x14, 4, 1)
	if got := g.read(0xd0000010, 4); got != 0xffffffff {
		t.Errorf("decoded above 4 GiB and here: %#x", got)
	}
	g.setConfig(slot, 0x14, 4, 0)
	want := []string{"0xc0000000 true", "0xc0000000 false", "0xd0000000 true", "0xd0000000 false", "0xd0000000 true"}
	if !slices.Equal(s.moves, want) {
		t.Errorf("moves %q, want %q", s.moves, want)
	}
	// Accesses across the end reach no BAR.
	if got := g.read(0xd0003ffe, 4); got != 0xffffffff {
		t.Errorf("access over the end %#x", got)
	}
	if f.AccessBAR(0, 0x3ffd, make([]byte, 4), false) || f.AccessBAR(1, 0, make([]byte, 4), false) || f.AccessBAR(9, 0, nil, true) {
		t.Error("AccessBAR succeeded without a BAR")
	}
}

func TestAddRefuses(t *testing.T) {
	b := pci.NewBus()
	s := &scratch{}
	f := pci.NewFunction(testID)
	check(t, f.AddBAR(0, pci.BAR{Size: 16, Wide: true, Region: s}))
	for _, bad := range []func() error{
		func() error { return f.AddBAR(1, pci.BAR{Size: 16, Region: s}) },
		func() error { return f.AddBAR(0, pci.BAR{Size: 16, Region: s}) },
		func() error { return f.AddBAR(5, pci.BAR{Size: 16, Wide: true, Region: s}) },
		func() error { return f.AddBAR(2, pci.BAR{Size: 24, Region: s}) },
		func() error { return f.AddBAR(2, pci.BAR{Size: 16}) },
		func() error { return f.AddCapability(pci.Capability{Data: make([]byte, 200)}) },
		func() error { return f.AddCapability(pci.Capability{Data: make([]byte, 2), Writable: make([]byte, 3)}) },
		func() error { _, err := f.AddMSIX(2, 0, nil, func(error) {}); return err },
		func() error { _, err := b.Add(32, f); return err },
		func() error { _, err := b.Add(-1, f); return err },
	} {
		if err := bad(); err == nil {
			t.Error("accepted")
		}
	}
	for want := 1; want < pci.Slots; want++ {
		f := pci.NewFunction(testID)
		check(t, f.AddBAR(0, pci.BAR{Size: 1 << 20, Region: s}))
		slot, err := b.Add(0, f)
		if check(t, err); slot != want {
			t.Fatalf("slot %d, want %d", slot, want)
		}
		if _, err := b.Add(0, f); err == nil {
			t.Fatal("added twice")
		}
	}
	if _, err := b.Add(0, f); err == nil {
		t.Error("a 33rd device")
	}
	b = pci.NewBus()
	big := pci.NewFunction(testID)
	check(t, big.AddBAR(0, pci.BAR{Size: pci.MMIOSize, Region: s}))
	_, err := b.Add(5, big)
	check(t, err)
	if _, err := b.Add(6, f); err == nil {
		t.Error("a BAR where there is no room")
	}
	if _, err := b.Add(5, f); err == nil {
		t.Error("two in one slot")
	}
}

func ExampleBus() {
	bus := pci.NewBus()
	slot, err := bus.Add(0, pci.NewFunction(pci.Identity{Vendor: 0x1af4, Device: 0x1042, Class: 0x018000}))
	if err != nil {
		fmt.Println(err)
		return
	}
	id := make([]byte, 4)
	bus.ECAM().Read(uint64(slot)<<15, id)
	fmt.Printf("slot %d: % x\n", slot, id)
	// Output: slot 1: f4 1a 42 10
}
