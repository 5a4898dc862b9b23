package platform

import (
	"testing"

	"pgregory.net/rapid"
)

// After any accesses of a guest and the host, a copy that has loaded PM's state
// saves the same state, and sets the same level of the interrupt.
func TestPMRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var level, copyLevel bool
		d := NewPM(PMConfig{SCI: func(l bool) { level = l }, PowerOff: func() {}})
		for range rapid.IntRange(0, 40).Draw(t, "steps") {
			if rapid.IntRange(0, 2).Draw(t, "step") == 0 {
				d.PressPowerButton()
			} else {
				d.Write(rapid.Uint64Range(0, PMPorts-1).Draw(t, "at"), rapid.SliceOfN(rapid.Byte(), 1, 4).Draw(t, "bytes"))
			}
		}
		s := d.SaveState()
		peer := NewPM(PMConfig{SCI: func(l bool) { copyLevel = l }, PowerOff: func() {}})
		if err := peer.LoadState(s); err != nil {
			t.Fatal(err)
		}
		if got := peer.SaveState(); got != s || copyLevel != level {
			t.Fatalf("%+v, interrupt %v, became %+v, interrupt %v", s, level, got, copyLevel)
		}
	})
}
