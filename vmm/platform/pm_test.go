package platform

import (
	"encoding/binary"
	"fmt"
	"testing"
)

func get16(d *PM, off uint64) uint16 {
	var p [2]byte
	d.Read(off, p[:])
	return binary.LittleEndian.Uint16(p[:])
}

func put16(d *PM, off uint64, v uint16) {
	d.Write(off, binary.LittleEndian.AppendUint16(nil, v))
}

// The button raises the interrupt if the guest has enabled it, until the guest
// acknowledges it.
func TestPowerButton(t *testing.T) {
	sci := ""
	d := NewPM(PMConfig{SCI: func(level bool) { sci += fmt.Sprint(level, " ") }})
	d.PressPowerButton()
	if sci != "" || d.ButtonEnabled() || get16(d, 0) != 0x100 {
		t.Errorf("not enabled: interrupt %q, status %#x", sci, get16(d, 0))
	}
	put16(d, 2, 0x100)
	if sci != "true " || !d.ButtonEnabled() || get16(d, 2) != 0x100 {
		t.Errorf("enabled: interrupt %q, enable %#x", sci, get16(d, 2))
	}
	put16(d, 0, 0x400) // another event's bit
	if sci != "true " {
		t.Errorf("another bit was cleared: interrupt %q", sci)
	}
	d.Write(1, []byte{1}) // a byte alone
	if sci != "true false " || get16(d, 0) != 0 {
		t.Errorf("cleared: interrupt %q, status %#x", sci, get16(d, 0))
	}
	if s := d.SaveState(); s.Presses != 1 || s.Taken != 1 {
		t.Errorf("state %+v", s)
	}
}

// Soft off, by a write of 16 bits or of the upper byte, and by no other write.
func TestSoftOff(t *testing.T) {
	off := 0
	d := NewPM(PMConfig{SCI: func(bool) { t.Error("interrupt") }, PowerOff: func() { off++ }})
	put16(d, 4, 0x1c01)
	if off != 0 || get16(d, 4) != 0x1c01 {
		t.Errorf("%d times off, control %#x", off, get16(d, 4))
	}
	put16(d, 0, 0x2000)
	put16(d, 2, 0x2000)
	d.Write(4, []byte{0x20})
	if off != 0 {
		t.Error("off by another register")
	}
	put16(d, 4, 0x3401)
	if off != 1 || get16(d, 4) != 0x1401 {
		t.Errorf("%d times off, control %#x", off, get16(d, 4))
	}
	d.Write(5, []byte{0x34})
	if off != 2 {
		t.Errorf("%d times off by a byte", off)
	}
	// Accesses of all registers, and beyond the end.
	d.Write(0, []byte{0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff})
	if off != 2 || get16(d, 2) != pmEvents {
		t.Errorf("%d times off, enable %#x", off, get16(d, 2))
	}
	p := make([]byte, 8)
	d.Read(4, p)
	if string(p) != "\x01\x00\x00\x00\x00\x00\x00\x00" {
		t.Errorf("beyond the end: % x", p)
	}
}

// A press of the button that the guest has not acknowledged is in the saved state.
func TestPMState(t *testing.T) {
	d := NewPM(PMConfig{SCI: func(bool) {}})
	put16(d, 2, 0x121)
	put16(d, 4, 0x1400)
	d.PressPowerButton()
	s := d.SaveState()
	level := false
	e := NewPM(PMConfig{SCI: func(l bool) { level = l }})
	if err := e.LoadState(s); err != nil || e.SaveState() != s || !level {
		t.Errorf("%v: %+v became %+v, interrupt %v", err, s, e.SaveState(), level)
	}
	for _, bad := range []PMState{{Status: 2}, {Enable: 1 << 15}, {Control: 1}, {Taken: 1}} {
		if err := e.LoadState(bad); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
	if e.SaveState() != s {
		t.Errorf("a refused state changed %+v", e.SaveState())
	}
}

func TestPVPanic(t *testing.T) {
	var got []byte
	d := NewPVPanic(func(e byte) { got = append(got, e) })
	p := make([]byte, 1)
	if d.Read(0, p); p[0] != 3 {
		t.Errorf("events %#x", p[0])
	}
	for _, v := range []byte{0, 0x80, pvPanicked | 0x40, PVCrashLoaded} {
		d.Write(0, []byte{v})
	}
	if string(got) != "\x01" {
		t.Errorf("told % x", got)
	}
}

func ExamplePM() {
	pm := NewPM(PMConfig{
		SCI:      func(level bool) { fmt.Println("interrupt", level) },
		PowerOff: func() { fmt.Println("off") },
	})
	pm.Write(2, []byte{0, 1}) // the guest enables the button
	pm.PressPowerButton()     // the button is pressed
	pm.Write(0, []byte{0, 1}) // the guest acknowledges it
	pm.Write(5, []byte{0x34}) // the guest turns itself off
	// Output:
	// interrupt true
	// interrupt false
	// off
}
