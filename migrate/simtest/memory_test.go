package simtest

import (
	"testing"

	"github.com/govmm/govmm/migrate"
)

// The behaviour of KVM's dirty log that the simulation has; package kvm has the same tests
// for the real one.

func one(t *testing.T, l Layout) *Memory {
	t.Helper()
	l.Slots = []migrate.Slot{{Pages: 70}}
	m, err := NewMemory(l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	if err := m.StartDirtyLog(); err != nil {
		t.Fatal(err)
	}
	return m
}

func fetch(t *testing.T, m *Memory) []uint64 {
	t.Helper()
	b := []uint64{^uint64(0), ^uint64(0)}
	if err := m.FetchDirtyLog(0, b); err != nil {
		t.Fatal(err)
	}
	return b
}

func wantLog(t *testing.T, m *Memory, when string, w0, w1 uint64) {
	t.Helper()
	if b := fetch(t, m); b[0] != w0 || b[1] != w1 {
		t.Errorf("%s: the log is %#x, want [%#x %#x]", when, b, w0, w1)
	}
}

func clearLog(t *testing.T, m *Memory, w0, w1 uint64) {
	t.Helper()
	if err := m.ClearDirtyLog(0, 0, 70, []uint64{w0, w1}); err != nil {
		t.Fatal(err)
	}
}

func TestManualProtect(t *testing.T) {
	m := one(t, Layout{ManualProtect: true})
	wantLog(t, m, "at first", 0, 0)
	m.GuestWrite(0, 3)
	m.GuestWrite(0, 69)
	wantLog(t, m, "after two writes", 1<<3, 1<<5)
	wantLog(t, m, "fetched again: GET clears nothing", 1<<3, 1<<5)
	m.GuestWrite(0, 4)
	clearLog(t, m, 1<<3|1<<6, 1<<5) // page 6 is not set: a no-op
	wantLog(t, m, "after CLEAR of what was fetched", 1<<4, 0)
	if faults := m.Faults(); faults != 3 {
		t.Errorf("%d faults, want 3", faults)
	}
	m.GuestWrite(0, 3)
	wantLog(t, m, "CLEAR re-arms", 1<<3|1<<4, 0)
	m.GuestWrite(0, 3)
	if faults := m.Faults(); faults != 4 {
		t.Errorf("%d faults, want 4: a write to a page that is dirty is free", faults)
	}
	clearLog(t, m, ^uint64(0), ^uint64(0))
	wantLog(t, m, "a bit that was cleared without having been fetched is lost", 0, 0)
}

func TestInitiallySet(t *testing.T) {
	m := one(t, Layout{ManualProtect: true, InitiallySet: true})
	wantLog(t, m, "at first", ^uint64(0), 1<<6-1)
	m.GuestWrite(0, 3)
	if m.Faults() != 0 {
		t.Error("a page was armed before its CLEAR")
	}
	clearLog(t, m, ^uint64(0), 1<<6-1)
	wantLog(t, m, "after the CLEAR", 0, 0)
	m.GuestWrite(0, 3)
	wantLog(t, m, "after a write", 1<<3, 0)
}

func TestWithoutManualProtectGETClears(t *testing.T) {
	m := one(t, Layout{})
	m.GuestWrite(0, 3)
	wantLog(t, m, "after a write", 1<<3, 0)
	wantLog(t, m, "fetched again", 0, 0)
	m.GuestWrite(0, 3)
	wantLog(t, m, "after another write", 1<<3, 0)
	if err := m.ClearDirtyLog(0, 0, 64, make([]uint64, 1)); err == nil {
		t.Error("CLEAR without manual protection: no error")
	}
}

func TestAWriteDuringAClearGoesUnrecorded(t *testing.T) {
	m := one(t, Layout{ManualProtect: true})
	m.GuestWrite(0, 3)
	m.Hooks.Window = func(int, uint64, uint64) { m.GuestWrite(0, 3) }
	clearLog(t, m, 1<<3, 0)
	m.Hooks.Window = nil
	wantLog(t, m, "after the CLEAR", 0, 0)
	m.GuestWrite(0, 3)
	wantLog(t, m, "after a write", 1<<3, 0)
}

func TestClearChecksItsRange(t *testing.T) {
	m := one(t, Layout{ManualProtect: true})
	for _, c := range []struct{ first, n, words uint64 }{
		{1, 64, 1}, {0, 63, 1}, {0, 128, 2}, {64, 7, 1}, {128, 64, 1}, {0, 64, 2}, {0, 0, 0}, {64, ^uint64(0), 1},
	} {
		if err := m.ClearDirtyLog(0, c.first, c.n, make([]uint64, c.words)); err == nil {
			t.Errorf("CLEAR of [%d,+%d) with %d words: no error", c.first, c.n, c.words)
		}
	}
	if err := m.ClearDirtyLog(0, 64, 6, make([]uint64, 1)); err != nil {
		t.Error(err)
	}
}

func TestLogsOfKernelDevicesAndPunches(t *testing.T) {
	m := one(t, Layout{ManualProtect: true})
	kernel, device := m.KernelWrite(0, 1), m.DeviceWrite(0, 2)
	wantLog(t, m, "landed, not logged", 0, 0)
	kernel()
	device()
	m.Punch(0, 3, 2, true)
	wantLog(t, m, "KVM's log has the kernel's", 1<<1, 0)
	vmm := make([]uint64, 2)
	for _, want := range []uint64{1<<2 | 1<<3 | 1<<4, 0} {
		clear(vmm)
		if err := m.FetchVMMDirty(0, func(w int, word uint64) { vmm[w] = word }); err != nil || vmm[0] != want {
			t.Errorf("the VMM's log is %#x, want %#x, error %v", vmm[0], want, err)
		}
	}
	populated := make([]uint64, 2)
	if err := m.Populated(0, 0, 70, populated); err != nil || populated[0] != 1<<1|1<<2 {
		t.Errorf("populated %#x, error %v", populated[0], err)
	}
	m.Bytes(0, 69, 1)[0] = 1
	if err := m.Populated(0, 64, 6, populated); err != nil || populated[0] != 1<<5 {
		t.Errorf("populated %#x, error %v", populated[0], err)
	}
}

func TestHistoryKeepsTheLastWrites(t *testing.T) {
	m := one(t, Layout{ManualProtect: true})
	for range 10 {
		m.GuestWrite(0, 5)
	}
	m.Punch(0, 5, 1, false)
	h := m.History(0, 5)
	if len(h) != 8 || h[0].Seq != 4 || h[7].Seq != 11 || h[7].By != Punch || h[7].Logged {
		t.Errorf("history %v", h)
	}
}

func TestPrefaultedPagesAreNoHoles(t *testing.T) {
	m := one(t, Layout{ManualProtect: true})
	if err := m.Prefault(0, 2, 3); err != nil {
		t.Fatal(err)
	}
	populated := make([]uint64, 2)
	if err := m.Populated(0, 0, 70, populated); err != nil || populated[0] != 7<<2 {
		t.Errorf("populated %#x, error %v", populated[0], err)
	}
	wantLog(t, m, "after Prefault", 0, 0)
}
