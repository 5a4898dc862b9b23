package platform

import (
	"testing"

	"pgregory.net/rapid"
)

// Whatever a guest and a host have done to it, a twin of PM saves what it loaded,
// and has the interrupt's level.
func TestPMRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var level, twinLevel bool
		d := NewPM(PMConfig{SCI: func(l bool) { level = l }, PowerOff: func() {}})
		for range rapid.IntRange(0, 40).Draw(t, "steps") {
			switch rapid.IntRange(0, 9).Draw(t, "step") {
			case 0:
				d.Reset()
			case 1, 2, 3:
				d.PressPowerButton()
			default:
				d.Write(rapid.Uint64Range(0, PMPorts-1).Draw(t, "at"), rapid.SliceOfN(rapid.Byte(), 1, 4).Draw(t, "bytes"))
			}
		}
		s := d.SaveState()
		twin := NewPM(PMConfig{SCI: func(l bool) { twinLevel = l }, PowerOff: func() {}})
		if err := twin.LoadState(s); err != nil {
			t.Fatal(err)
		}
		if got := twin.SaveState(); got != s || twinLevel != level {
			t.Fatalf("%+v, interrupt %v, became %+v, interrupt %v", s, level, got, twinLevel)
		}
	})
}
