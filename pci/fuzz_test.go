package pci_test

import (
	"encoding/binary"
	"reflect"
	"testing"
)

// For any writes of a guest to configuration spaces and the MSI-X table: no panic;
// read-only bytes do not change; a BAR's address is aligned; the BAR is mapped there
// if it is inside the window and decoding is on, and nowhere else; a saved state can
// be loaded and is the same.
func FuzzConfig(f *testing.F) {
	f.Add([]byte{0, 0x10, 0xff, 0xff, 0xff, 0xff, 0, 4, 2, 0, 0, 0, 1, 0x10, 0, 0, 0, 0xd0})
	f.Add([]byte{0, 0x42, 0, 0xc0, 0, 0, 2, 0x0c, 0, 0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0x42, 0, 0x80, 0, 0})
	f.Fuzz(func(t *testing.T, ops []byte) {
		c := newController(t)
		g, fn, m, s := newDevice(t, c)
		var fixed [0x10]uint32
		for i := range fixed {
			fixed[i] = g.config(3, i*4, 4)
		}
		for ; len(ops) >= 6; ops = ops[6:] {
			reg, v := int(ops[1]), binary.LittleEndian.Uint32(ops[2:])
			switch ops[0] % 5 {
			case 0:
				g.setConfig(3, reg, 4, v)
			case 1:
				g.setConfig(3, reg, 1<<(ops[0]>>5%2), v)
			case 2:
				m.Write(uint64(reg), ops[2:6])
			case 3:
				m.Raise(reg % 4)
			case 4:
				g.bus.Ports(nil).Write(uint64(reg%8), ops[2:6])
			}
		}
		for _, reg := range []int{0, 2, 0x0b} {
			if got := g.config(3, reg*4, 4); got != fixed[reg] {
				t.Fatalf("register %#x became %#x", reg*4, got)
			}
		}
		base := uint64(g.config(3, 0x10, 4)) | uint64(g.config(3, 0x14, 4))<<32
		if base&0x3fff != 4 {
			t.Fatalf("BAR 0 is %#x", base)
		}
		base &^= 0xf
		on := g.config(3, 4, 2)&2 != 0 && base >= 0xc0000000 && base <= 0xe0000000-0x4000
		if on {
			s.bytes[0x3000] = 0xa5
			other := uint64(g.config(3, 0x18, 4))
			if got := g.read(base+0x3000, 1); got != 0xa5 && (other > base+0x3fff || other+0x1fff < base) {
				t.Fatalf("BAR 0 at %#x reads %#x", base, got)
			}
		}
		if last := s.moves[len(s.moves)-1]; (last[len(last)-4:] == "true") != on {
			t.Fatalf("BAR 0 at %#x, decoding %v, last move %q", base, on, last)
		}
		m.Suspend()
		state := fn.SaveState()
		_, dup, n, _ := newDevice(t, newController(t))
		n.Suspend()
		check(t, dup.LoadState(state))
		if again := dup.SaveState(); !reflect.DeepEqual(state, again) {
			t.Fatalf("saved %+v, loaded, saved %+v", state, again)
		}
	})
}
