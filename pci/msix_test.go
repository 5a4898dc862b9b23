package pci_test

import (
	"errors"
	"reflect"
	"testing"
)

const (
	msixBase    = 0xc0004000
	msixControl = 0x42
)

// program writes an entry like a driver.
func (g guest) program(i int, data uint32, masked uint64) {
	at := uint64(msixBase + 16*i)
	g.write(at, 4, 0xfee00000)
	g.write(at+4, 4, 0)
	g.write(at+8, 4, uint64(data))
	g.write(at+12, 4, masked)
}

func (g guest) pending() uint64 { return g.read(msixBase+0x1000, 8) }

func TestMSIX(t *testing.T) {
	c := newController(t)
	g, _, m, _ := newDevice(t, c)
	want := func(step string, data uint32, n uint64, pending uint64) {
		t.Helper()
		if got := c.take(data); got != n {
			t.Errorf("%s: %d messages, want %d", step, got, n)
		}
		if got := g.pending(); got != pending {
			t.Errorf("%s: pending %#x, want %#x", step, got, pending)
		}
	}
	if got := g.read(msixBase+12, 4); got != 1 {
		t.Errorf("vector control %#x at the start", got)
	}
	m.Raise(0)
	want("off", 0, 0, 0)
	g.setConfig(3, msixControl, 2, 0xc000)
	for i := range 3 {
		g.program(i, uint32(0x40+i), 0)
	}
	m.Raise(1)
	want("function masked", 0x41, 0, 2)
	g.setConfig(3, msixControl, 2, 0x8000)
	want("function unmasked", 0x41, 1, 0)
	m.Raise(2)
	m.Raise(3)
	m.Raise(-1)
	m.Raise(0xffff)
	want("on", 0x42, 1, 0)
	g.write(msixBase+16+12, 4, 0xffffffff)
	if got := g.read(msixBase+16+12, 4); got != 1 {
		t.Errorf("vector control %#x", got)
	}
	m.Raise(1)
	m.Raise(1)
	want("masked", 0x41, 0, 2)
	g.write(msixBase+0x1000, 8, 0) // read-only
	g.write(msixBase+16+8, 4, 0x61)
	g.write(msixBase+16+12, 4, 0)
	want("unmasked, elsewhere", 0x61, 1, 0)
	g.write(msixBase+8, 8, 0x70) // 8 bytes; and while unmasked
	m.Raise(0)
	want("moved", 0x70, 1, 0)

	m.Suspend()
	m.Raise(2)
	want("suspended", 0x42, 0, 4)
	m.Resume()
	want("resumed", 0x42, 1, 0)
	m.Suspend()
	m.Raise(2)
	m.ClearPending()
	m.Resume()
	want("forgotten", 0x42, 0, 0)

	// What cannot be sent stays pending.
	c.fail = errors.New("no")
	g.write(msixBase+8, 4, 0x71)
	m.Raise(0)
	want("not sent", 0x71, 0, 1)
	c.fail = nil
	g.write(msixBase+12, 4, 0)
	want("sent now", 0x71, 1, 0)

	g.setConfig(3, msixControl, 2, 0)
	m.Raise(0)
	want("off again", 0x71, 0, 0)
	if m.Vectors() != 3 {
		t.Error("another number of vectors")
	}
}

// A saved state includes a pending message and all of the function's registers.
func TestSaveLoad(t *testing.T) {
	c := newController(t)
	g, f, m, _ := newDevice(t, c)
	g.setConfig(3, msixControl, 2, 0x8000)
	for i := range 3 {
		g.program(i, uint32(0x40+i), uint64(i&1))
	}
	g.setConfig(3, 0x10, 4, 0xd8000000)
	g.setConfig(3, 0x3c, 1, 9)
	m.Raise(1)
	m.Suspend()
	m.Raise(0)
	s := f.SaveState()
	busState := g.bus.SaveState()

	d := newController(t)
	h, dup, n, sc := newDevice(t, d)
	n.Suspend()
	check(t, h.bus.LoadState(busState))
	check(t, dup.LoadState(s))
	if again := dup.SaveState(); !reflect.DeepEqual(s, again) {
		t.Errorf("saved %+v, loaded, saved %+v", s, again)
	}
	if again := h.bus.SaveState(); !reflect.DeepEqual(busState, again) {
		t.Errorf("saved %+v, loaded, saved %+v", busState, again)
	}
	if last := sc.moves[len(sc.moves)-1]; last != "0xd8000000 true" {
		t.Errorf("the copy's BAR: %q", sc.moves)
	}
	if len(d.arrived) != 0 {
		t.Error("interrupts before Resume")
	}
	n.Resume()
	if d.take(0x40) != 1 || h.pending() != 2 {
		t.Errorf("after Resume: pending %#x", h.pending())
	}
	h.write(msixBase+16+12, 4, 0)
	if d.take(0x41) != 1 {
		t.Error("the masked vector's message is lost")
	}

	for name, change := range map[string]func(){
		"config":   func() { s.Config = s.Config[:255] },
		"identity": func() { s.Config[2]++ },
		"BAR bits": func() { s.Config[0x11] |= 1 },
		"table":    func() { s.Table = s.Table[:16] },
		"control":  func() { s.Table[13] = 1 },
		"pending":  func() { s.Pending[0] = 8 },
	} {
		s = f.SaveState()
		change()
		before := dup.SaveState()
		if err := dup.LoadState(s); err == nil {
			t.Errorf("%s: loaded", name)
		}
		if !reflect.DeepEqual(before, dup.SaveState()) {
			t.Errorf("%s: half loaded", name)
		}
	}
	busState.Address = 1
	if err := h.bus.LoadState(busState); err == nil {
		t.Error("a bus state with a crooked address")
	}
}
