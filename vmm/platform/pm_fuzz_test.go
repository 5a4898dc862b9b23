package platform

import (
	"bytes"
	"testing"
)

// FuzzPM lets a guest do anything with the registers of power management, while the
// button is pressed: the interrupt follows the registers, and a state that was saved
// loads and is the same.
func FuzzPM(f *testing.F) {
	f.Add([]byte{3, 1, 0xff, 0, 0, 1, 1, 0x01, 4, 2, 0x00, 0x20})
	f.Fuzz(func(t *testing.T, ops []byte) {
		level := false
		pm := NewPM(PMConfig{SCI: func(l bool) { level = l }, PowerOff: func() {}})
		for ; len(ops) >= 4; ops = ops[4:] {
			off, n := uint64(ops[0]%8), min(int(ops[1]&3)+1, PMPorts)
			switch {
			case ops[1]&0x80 != 0:
				pm.PressPowerButton()
			case ops[1]&0x40 != 0:
				pm.Read(off, make([]byte, n))
			default:
				pm.Write(off, bytes.Repeat(ops[2:4], 2)[:n])
			}
			s := pm.SaveState()
			if level != (s.Status&s.Enable != 0) {
				t.Fatalf("the interrupt is %v with status %#x and enable %#x", level, s.Status, s.Enable)
			}
			var got bool
			other := NewPM(PMConfig{SCI: func(l bool) { got = l }, PowerOff: func() {}})
			if err := other.LoadState(s); err != nil || other.SaveState() != s || got != level {
				t.Fatalf("%+v loads as %+v, interrupt %v: %v", s, other.SaveState(), got, err)
			}
		}
	})
}
