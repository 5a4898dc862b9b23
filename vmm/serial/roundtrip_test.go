package serial

import (
	"io"
	"reflect"
	"testing"

	"pgregory.net/rapid"
)

// Whatever a guest and a user have done to it, another UART saves what it loaded.
func TestStateRoundTrip(t *testing.T) {
	outer := t
	rapid.Check(t, func(t *rapid.T) {
		u, _ := newUART(outer, io.Discard)
		u.HoldLine(true)
		for range rapid.IntRange(0, 60).Draw(t, "steps") {
			reg := rapid.Uint8Max(7).Draw(t, "register")
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0:
				u.ReadPort(reg)
			case 1:
				u.Feed(rapid.SliceOfN(rapid.Byte(), 0, 30).Draw(t, "input"))
			default:
				u.WritePort(reg, rapid.Byte().Draw(t, "value"))
			}
		}
		s := u.SaveState()
		dst, _ := newUART(outer, io.Discard)
		dst.HoldLine(true)
		if err := dst.LoadState(s); err != nil {
			t.Fatal(err)
		}
		if got := dst.SaveState(); !reflect.DeepEqual(s, got) {
			t.Fatalf("%+v became %+v", s, got)
		}
	})
}
