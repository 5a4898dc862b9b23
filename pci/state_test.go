package pci_test

import (
	"reflect"
	"testing"

	"pgregory.net/rapid"
)

// After any writes of a guest to configuration spaces and the MSI-X table, and with any
// pending interrupts, copies of function and bus save the state that they have loaded.
func TestStateRoundTrip(t *testing.T) {
	outer := t
	rapid.Check(t, func(t *rapid.T) {
		g, f, m, _ := newDevice(outer, newController(outer))
		for range rapid.IntRange(0, 60).Draw(t, "steps") {
			v := rapid.Uint32().Draw(t, "value")
			switch rapid.IntRange(0, 4).Draw(t, "step") {
			case 0:
				slot := rapid.SampledFrom([]int{0, 3}).Draw(t, "slot")
				n := rapid.SampledFrom([]int{1, 2, 4}).Draw(t, "bytes")
				g.setConfig(slot, rapid.IntRange(0, 255/n).Draw(t, "register")*n, n, v)
			case 1:
				p := []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)}
				m.Write(rapid.Uint64Range(0, 3*16/4-1).Draw(t, "table")*4, p)
			case 2:
				m.Raise(rapid.IntRange(0, 2).Draw(t, "vector"))
			case 3:
				g.setConfig(3, 0x42, 2, rapid.SampledFrom([]uint32{0, 0x4000, 0x8000, 0xc000}).Draw(t, "control"))
			case 4:
				g.bus.Ports(nil).Write(0, []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24)})
			}
		}
		m.Suspend()
		s, bus := f.SaveState(), g.bus.SaveState()
		h, dup, n, _ := newDevice(outer, newController(outer))
		n.Suspend()
		if err := dup.LoadState(s); err != nil {
			t.Fatal(err)
		}
		if err := h.bus.LoadState(bus); err != nil {
			t.Fatal(err)
		}
		if got := dup.SaveState(); !reflect.DeepEqual(s, got) {
			t.Fatalf("%+v became %+v", s, got)
		}
		if got := h.bus.SaveState(); !reflect.DeepEqual(bus, got) {
			t.Fatalf("%+v became %+v", bus, got)
		}
	})
}
