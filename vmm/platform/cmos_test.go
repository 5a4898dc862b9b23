package platform

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

func cmosGet(d *CMOS, at byte) byte {
	d.Write(0, []byte{at | 0x80}) // NMI masked, like Linux
	var p [1]byte
	d.Read(1, p[:])
	return p[0]
}

func cmosSet(d *CMOS, at, v byte) {
	d.Write(0, []byte{at})
	d.Write(1, []byte{v})
}

// clockOf reads the clock in BCD with 24 hours.
func clockOf(d *CMOS) (b [8]byte) {
	for i, at := range []byte{0x32, 9, 8, 7, 4, 2, 0, 6} {
		b[i] = cmosGet(d, at)
	}
	return b
}

func TestClock(t *testing.T) {
	now := time.Date(2026, 11, 23, 22, 8, 59, 999, time.UTC)
	d := NewCMOS(CMOSConfig{Now: func() time.Time { return now }})
	if got := clockOf(d); got != [8]byte{0x20, 0x26, 0x11, 0x23, 0x22, 0x08, 0x59, 2} {
		t.Errorf("clock % x", got)
	}
	now = now.Add(time.Second)
	if got := clockOf(d); got != [8]byte{0x20, 0x26, 0x11, 0x23, 0x22, 0x09, 0x00, 2} {
		t.Errorf("a second later: % x", got)
	}
	for _, tt := range []struct {
		b    byte
		hour int
		want byte
	}{
		{0x02, 15, 0x15}, {0x06, 15, 15}, {0x00, 15, 0x83}, {0x04, 15, 0x83}, {0x00, 0, 0x12}, {0x00, 12, 0x92}, {0x04, 11, 11},
	} {
		now = time.Date(2026, 11, 23, tt.hour, 0, 0, 0, time.UTC)
		cmosSet(d, rtcB, tt.b)
		if got := cmosGet(d, rtcHour); got != tt.want {
			t.Errorf("mode %#x, hour %d reads %#x, not %#x", tt.b, tt.hour, got, tt.want)
		}
	}
	if a, dd := cmosGet(d, rtcA), cmosGet(d, rtcD); a != 0x26 || dd != 0x80 {
		t.Errorf("registers A %#x, D %#x", a, dd)
	}
}

// A guest sets the clock like Linux, which stops it for that time. The clock continues
// from the new time, on this host and after a migration.
func TestSetClock(t *testing.T) {
	now := time.Date(2026, 11, 23, 22, 8, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	d := NewCMOS(CMOSConfig{Now: clock})
	cmosSet(d, rtcB, 0x82)
	for at, v := range map[byte]byte{0x32: 0x19, 9: 0x99, 8: 0x12, 7: 0x31, 4: 0x23, 2: 0x59, 0: 0x58} {
		cmosSet(d, at, v)
	}
	now = now.Add(time.Minute)
	if got := clockOf(d); got != [8]byte{0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x58, 2} {
		t.Errorf("held: % x", got)
	}
	cmosSet(d, rtcB, 0x02)
	now = now.Add(2 * time.Second)
	e := NewCMOS(CMOSConfig{Now: clock})
	if err := e.LoadState(d.SaveState()); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*CMOS{d, e} {
		if got := clockOf(d); got != [8]byte{0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00, 7} {
			t.Errorf("two seconds after it was set: % x", got)
		}
	}
	cmosSet(d, rtcYear, 0x30) // while the clock runs
	if got := clockOf(d); got != [8]byte{0x20, 0x30, 0x01, 0x01, 0x00, 0x00, 0x00, 3} {
		t.Errorf("year set: % x", got)
	}
}

// CMOS memory is initialised with the sizes of the guest's RAM, and stores what the
// guest writes.
func TestCMOSMemory(t *testing.T) {
	const gib = 1 << 30
	for _, tt := range []struct {
		low, high     uint64
		ext, e64, hi  int
		hiMiddle, top byte
	}{
		{8 << 20, 0, 7 << 10, 0, 0, 0, 0},
		{256 << 20, 0, 0xfc00, 3840, 0, 0, 0},
		{3 * gib, 5 * gib, 0xfc00, 0xbf00, 0, 0x40, 1},
	} {
		d := NewCMOS(CMOSConfig{Low: tt.low, High: tt.high})
		word := func(at byte) int { return int(cmosGet(d, at)) | int(cmosGet(d, at+1))<<8 }
		if word(0x15) != 640 || word(0x17) != tt.ext || word(0x30) != tt.ext || word(0x34) != tt.e64 {
			t.Errorf("%d MiB: %d, %d, %d, %d", tt.low>>20, word(0x15), word(0x17), word(0x30), word(0x34))
		}
		if cmosGet(d, 0x5b) != 0 || cmosGet(d, 0x5c) != tt.hiMiddle || cmosGet(d, 0x5d) != tt.top {
			t.Errorf("above 4 GiB: %#x", word(0x5c))
		}
	}
	d := NewCMOS(CMOSConfig{})
	cmosSet(d, 0x7f, 0xa5)
	cmosSet(d, rtcC, 0xff)
	cmosSet(d, rtcD, 0)
	if cmosGet(d, 0x7f) != 0xa5 || cmosGet(d, rtcC) != 0 || cmosGet(d, rtcD) != 0x80 {
		t.Error("memory and registers that are read only")
	}
	var p [2]byte
	if d.Read(0, p[:]); p[0] != 0xff || p[1] != 0x80 {
		t.Errorf("both ports: % x", p)
	}
}

// After any writes of a guest the clock can be read, and the state is the same after
// saving and loading.
func TestCMOSStateProperty(t *testing.T) {
	now := time.Date(2026, 11, 23, 22, 8, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	rapid.Check(t, func(t *rapid.T) {
		d := NewCMOS(CMOSConfig{Now: clock})
		for range rapid.IntRange(0, 40).Draw(t, "accesses") {
			at := rapid.ByteMax(0x7f).Draw(t, "at")
			if rapid.Bool().Draw(t, "write") {
				cmosSet(d, at, rapid.Byte().Draw(t, "value"))
			} else {
				cmosGet(d, at)
			}
		}
		s := d.SaveState()
		e := NewCMOS(CMOSConfig{Now: clock})
		if err := e.LoadState(s); err != nil {
			t.Fatal(err)
		}
		if got := e.SaveState(); got != s {
			t.Fatalf("%+v became %+v", s, got)
		}
	})
	d := NewCMOS(CMOSConfig{Now: clock})
	for _, bad := range []CMOSState{{Index: 0x80}, {Offset: 1 << 60}, {Offset: -1 << 60}} {
		if err := d.LoadState(bad); err == nil {
			t.Errorf("%v was taken", bad)
		}
	}
}

func FuzzCMOS(f *testing.F) {
	f.Add([]byte{0x0b, 0x82, 0x09, 0xff, 0x08, 0x00, 0x0b, 0x02, 0x09})
	f.Fuzz(func(t *testing.T, accesses []byte) {
		d := NewCMOS(CMOSConfig{})
		for i := 0; i+1 < len(accesses); i += 2 {
			d.Write(0, accesses[i:i+1])
			d.Write(1, accesses[i+1:i+2])
			cmosGet(d, accesses[i])
		}
		if err := d.LoadState(d.SaveState()); err != nil {
			t.Error(err)
		}
	})
}
