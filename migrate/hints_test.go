package migrate_test

import (
	"errors"
	"testing"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
)

func begin(t *testing.T, tracker *migrate.Tracker, id uint32) {
	t.Helper()
	if err := tracker.BeginHintEpoch(id); err != nil {
		t.Fatal(err)
	}
}

func TestAHintSparesPagesUntilTheyAreWritten(t *testing.T) {
	for _, layout := range []simtest.Layout{{}, {ManualProtect: true}, {ManualProtect: true, InitiallySet: true}} {
		m := newMemory(t, layout, 256)
		tracker := newTracker(t, m, 7)
		m.GuestWrite(0, 100) // before the announcement: does not keep the page from being hinted
		begin(t, tracker, 1)
		m.GuestWrite(0, 101) // after it, and fetched
		if err := tracker.Sync(); err != nil {
			t.Fatal(err)
		}
		if taken := tracker.Hint(1, 0, 96, 10); taken != 9 {
			t.Errorf("%+v: %d pages taken, want 9", layout, taken)
		}
		if got := tracker.Remaining(); got != 247 {
			t.Errorf("%+v: %d pages remain, want 247", layout, got)
		}
		m.GuestWrite(0, 102)    // taken back later
		m.DeviceWrite(0, 103)() // a block that the guest reads into it
		if err := tracker.Sync(); err != nil {
			t.Fatal(err)
		}
		if taken := tracker.Hint(1, 0, 96, 10); taken != 0 {
			t.Errorf("%+v: the same hint again took %d pages", layout, taken)
		}
		want := migrate.HintStats{Taken: 9, Returned: 2, Written: 1 + 3}
		if got := tracker.HintStats(); got != want {
			t.Errorf("%+v: %+v, want %+v", layout, got, want)
		}
	}
}

func TestHintsOfAnotherIDCountForNothing(t *testing.T) {
	tracker := newTracker(t, newMemory(t, manual, 64), 6)
	hint := func(id uint32, when string) {
		t.Helper()
		if taken := tracker.Hint(id, 0, 0, 64); taken != 0 || tracker.Remaining() != 64 {
			t.Errorf("%s: %d pages taken", when, taken)
		}
	}
	hint(0, "before any epoch")
	begin(t, tracker, 7)
	hint(6, "another id")
	begin(t, tracker, 8)
	hint(7, "the id before")
	tracker.EndHintEpoch()
	hint(8, "after the end")
	if got := tracker.HintStats().Stale; got != 4*64 {
		t.Errorf("%d stale pages", got)
	}
	if err := tracker.BeginHintEpoch(8); err == nil {
		t.Error("the id of the epoch before was taken for a new one")
	}
	hint(8, "after a refused announcement")
}

func TestAHintIsTheGuestsWord(t *testing.T) {
	m := newMemory(t, manual, 100)
	tracker := newTracker(t, m, 6)
	begin(t, tracker, 1)
	const most = ^uint64(0)
	for _, c := range []struct {
		slot     int
		first, n uint64
		taken    uint64
	}{
		{-1, 0, 1, 0}, {1, 0, 1, 0}, {0, 100, 1, 0}, {0, most, most, 0}, {0, 5, 0, 0},
		{0, 99, most, 1}, {0, 90, 20, 9}, {0, 0, most, 90},
	} {
		if taken := tracker.Hint(1, c.slot, c.first, c.n); taken != c.taken {
			t.Errorf("hint of slot %d [%#x,+%#x): %d pages taken, want %d", c.slot, c.first, c.n, taken, c.taken)
		}
	}
}

// After a failed announcement there is no epoch, and no page that was armed before the
// failure is lost.
func TestAFailedAnnouncementLeavesNoEpoch(t *testing.T) {
	for _, fail := range []func(*simtest.Memory){
		func(m *simtest.Memory) { m.Hooks.FailClear = func(int, uint64, uint64) error { return errInjected } },
		func(m *simtest.Memory) { m.Hooks.FailFetch = func(int) error { return errInjected } },
	} {
		m := newMemory(t, simtest.Layout{ManualProtect: true, InitiallySet: true}, 64)
		tracker := newTracker(t, m, 6)
		fail(m)
		if err := tracker.BeginHintEpoch(1); !errors.Is(err, errInjected) {
			t.Fatalf("error %v", err)
		}
		if taken := tracker.Hint(1, 0, 0, 64); taken != 0 {
			t.Errorf("%d pages taken", taken)
		}
		m.Hooks.FailClear, m.Hooks.FailFetch = nil, nil
		begin(t, tracker, 1)
		if taken := tracker.Hint(1, 0, 0, 64); taken != 64 {
			t.Errorf("%d pages taken after the announcement was made", taken)
		}
	}
}
