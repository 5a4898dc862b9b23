package machine

import (
	"bytes"
	"math"
	"testing"
)

// recorder is a device that fills reads with its letter and keeps writes.
type recorder struct {
	letter byte
	offs   []uint64
	wrote  []byte
}

func (r *recorder) Read(off uint64, p []byte) {
	r.offs = append(r.offs, off)
	for i := range p {
		p[i] = r.letter
	}
}

func (r *recorder) Write(off uint64, p []byte) {
	r.offs = append(r.offs, off)
	r.wrote = append(r.wrote, p...)
}

func TestBus(t *testing.T) {
	var b Bus
	a, c, last := &recorder{letter: 'a'}, &recorder{letter: 'c'}, &recorder{letter: 'l'}
	check(t, b.Claim(0x3f8, 8, a))
	check(t, b.Claim(0x300, 4, c))
	check(t, b.Claim(math.MaxUint64-3, 4, last))
	for _, r := range [][2]uint64{{0x3f8, 8}, {0x3f0, 9}, {0x3ff, 1}, {0x2ff, 2}, {0, 0x1000}, {0x301, 1}, {math.MaxUint64, 1}, {0x500, 0}, {math.MaxUint64, 2}} {
		if err := b.Claim(r[0], r[1], c); err == nil {
			t.Errorf("[%#x, +%d) was given twice, or is not a range", r[0], r[1])
		}
	}
	check(t, b.Claim(0x3f0, 8, c))
	check(t, b.Claim(0x400, 1, c))
	for _, r := range []struct {
		addr uint64
		n    int
		want string
	}{
		{0x3f8, 1, "a"}, {0x3ff, 1, "a"}, {0x3fc, 4, "aaaa"}, {0x300, 4, "cccc"},
		{0x3fd, 4, "\xff\xff\xff\xff"}, // ends behind the range, though a device is there
		{0x2fe, 4, "\xff\xff\xff\xff"}, {0x304, 1, "\xff"}, {0, 2, "\xff\xff"},
		{math.MaxUint64, 1, "l"}, {math.MaxUint64 - 3, 4, "llll"}, {math.MaxUint64, 2, "\xff\xff"},
	} {
		p := make([]byte, r.n)
		b.Read(r.addr, p)
		if string(p) != r.want {
			t.Errorf("%d bytes at %#x read %q, want %q", r.n, r.addr, p, r.want)
		}
	}
	a.offs = nil
	b.Write(0x3f9, []byte{1, 2})
	b.Write(0x3fe, []byte{3, 4, 5, 6})
	b.Write(0x200, []byte{7})
	if !bytes.Equal(a.wrote, []byte{1, 2}) || len(a.offs) != 1 || a.offs[0] != 1 {
		t.Errorf("wrote %v at %v", a.wrote, a.offs)
	}
}

// TestPowerPorts: what a guest reads from the ports that end a machine, and that a wide
// write to PCI's configuration ports does not reset it.
func TestPowerPorts(t *testing.T) {
	newPorts := func() (*Machine, *Bus) {
		m := &Machine{gate: newGate()}
		check(t, m.createChipset())
		check(t, m.createDevices())
		return m, &m.board.ports
	}
	for _, c := range []struct {
		port  uint64
		write []byte
		ends  bool
		kind  ExitKind
		read  []byte
	}{
		{0x604, []byte{0x00, 0x20}, true, ExitPowerOff, []byte{0x01, 0x00}},
		{0x604, []byte{0x00, 0x34}, true, ExitPowerOff, []byte{0x01, 0x14}}, // SLP_TYP stays
		{0x605, []byte{0x20}, true, ExitPowerOff, []byte{0x00}},
		{0x604, []byte{0x01, 0x1c}, false, 0, []byte{0x01, 0x1c}},
		{0x604, []byte{0x20}, false, 0, []byte{0x01}},
		{0x604, []byte{0x00, 0x20, 0, 0}, false, 0, []byte{0xff, 0xff, 0xff, 0xff}},
		{0xcf9, []byte{0x06}, true, ExitReset, []byte{0x02}},
		{0xcf9, []byte{0x02}, false, 0, []byte{0x02}},
		{0xcf8, []byte{0x00, 0x06, 0x00, 0x80}, false, 0, []byte{0x00, 0x06, 0x00, 0x80}}, // PCI's address
		{0xcf8, []byte{0x00, 0x06}, false, 0, []byte{0xff, 0xff}},
		{0xcf9, []byte{0x06, 0x06}, false, 0, []byte{0xff, 0xff}},
		{0x64, []byte{0xfe}, true, ExitReset, []byte{0x00}},
		{0x64, []byte{0xd1}, false, 0, []byte{0x00}},
		{0x60, []byte{0xfe}, false, 0, []byte{0x00}},
	} {
		m, ports := newPorts()
		ports.Write(c.port, c.write)
		if (m.ending.exit != nil) != c.ends || c.ends && m.ending.exit.Kind != c.kind {
			t.Errorf("writing % x to %#x: %+v", c.write, c.port, m.ending.exit)
		}
		p := make([]byte, len(c.read))
		ports.Read(c.port, p)
		if !bytes.Equal(p, c.read) {
			t.Errorf("%#x reads % x, want % x", c.port, p, c.read)
		}
	}
}
