package migrate_test

import (
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
)

func newMemory(t testing.TB, l simtest.Layout, pages ...uint64) *simtest.Memory {
	t.Helper()
	gpa := uint64(0)
	for _, n := range pages {
		l.Slots = append(l.Slots, migrate.Slot{GPA: gpa, Pages: n})
		gpa += n * mempage.Size
	}
	m, err := simtest.NewMemory(l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func newTracker(t testing.TB, m *simtest.Memory, shift uint) *migrate.Tracker {
	t.Helper()
	tracker, err := migrate.NewTracker(m.Slots(), m, shift)
	if err != nil {
		t.Fatal(err)
	}
	if err := tracker.Start(); err != nil {
		t.Fatal(err)
	}
	return tracker
}

var manual = simtest.Layout{ManualProtect: true}

func TestNewTrackerRefusesWhatItCannotTrack(t *testing.T) {
	log := newMemory(t, manual, 64)
	for _, c := range []struct {
		slots []migrate.Slot
		shift uint
		want  string
	}{
		{log.Slots(), 5, "clear bitmap shift 5: must be between 6 and 31"},
		{log.Slots(), 32, "clear bitmap shift 32: must be between 6 and 31"},
		{[]migrate.Slot{{Pages: 0}}, 18, "slot 0 has 0 pages"},
		{[]migrate.Slot{{Pages: 1 << 31}}, 18, "slot 0 has 2147483648 pages"},
	} {
		if _, err := migrate.NewTracker(c.slots, log, c.shift); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v shift %d: %v, want %q", c.slots, c.shift, err, c.want)
		}
	}
}

func TestArgumentsAreChecked(t *testing.T) {
	tracker := newTracker(t, newMemory(t, manual, 100), 6)
	picked := make([]uint64, 2)
	for _, c := range []struct {
		slot int
		max  uint64
	}{{-1, 64}, {1, 64}, {0, 0}, {0, 65}, {0, 192}} {
		if _, n, err := tracker.Pick(c.slot, 0, c.max, picked); err == nil || n != 0 {
			t.Errorf("Pick of slot %d, %d pages: n %d, error %v", c.slot, c.max, n, err)
		}
	}
	if _, err := tracker.SyncSlot(1); err == nil {
		t.Error("SyncSlot of a slot that is not there: no error")
	}
	if first, n, err := tracker.Pick(0, 1<<63, 64, picked); first != 100 || n != 0 || err != nil {
		t.Errorf("Pick past the end: first %d, n %d, error %v", first, n, err)
	}
	if got := tracker.Remaining(); got != 100 {
		t.Errorf("%d pages remain of 100", got)
	}
}

func TestPickCoversTheSlotInOrder(t *testing.T) {
	m := newMemory(t, manual, 1, 200)
	tracker := newTracker(t, m, 6)
	picked := make([]uint64, 2)
	if first, n, err := tracker.Pick(0, 0, 128, picked); first != 0 || n != 1 || picked[0] != 1 || picked[1] != 0 || err != nil {
		t.Fatalf("slot 0: [%d,+%d) %x %v", first, n, picked, err)
	}
	var got []uint64
	for from := uint64(0); ; {
		first, n, err := tracker.Pick(1, from, 128, picked)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
		got = append(got, first, n)
		from = first + n
	}
	if len(got) != 4 || got[0] != 0 || got[1] != 128 || got[2] != 128 || got[3] != 72 {
		t.Fatalf("slot 1 came as %v", got)
	}
	if picked[1] != 1<<8-1 {
		t.Fatalf("the last word is %#x", picked[1])
	}
	if tracker.Remaining() != 0 || tracker.SlotRemaining(1) != 0 {
		t.Fatalf("%d pages remain", tracker.Remaining())
	}

	// Only what was written comes again, in a range cut to it.
	m.GuestWrite(1, 130)
	if newly, err := tracker.SyncSlot(1); newly != 1 || err != nil {
		t.Fatalf("newly %d, error %v", newly, err)
	}
	if got := tracker.SlotRemaining(1); got != 1 {
		t.Fatalf("%d pages remain", got)
	}
	if first, n, err := tracker.Pick(1, 0, 128, picked); first != 128 || n != 64 || picked[0] != 1<<2 || err != nil {
		t.Fatalf("[%d,+%d) %x %v", first, n, picked, err)
	}
}

func TestDirtiedCountsAPageOncePerArming(t *testing.T) {
	for _, layout := range []simtest.Layout{{}, {ManualProtect: true}, {ManualProtect: true, InitiallySet: true}} {
		m := newMemory(t, layout, 64)
		tracker := newTracker(t, m, 6)
		picked := make([]uint64, 1)
		pick := func() {
			if _, _, err := tracker.Pick(0, 0, 64, picked); err != nil {
				t.Fatal(err)
			}
		}
		pick()
		m.GuestWrite(0, 1)
		m.GuestWrite(0, 2)
		m.DeviceWrite(0, 2)()
		m.DeviceWrite(0, 3)()
		for i, want := range []uint64{3, 0} { // fetched again, uncleared: not new
			if newly, err := tracker.SyncSlot(0); newly != want || err != nil {
				t.Fatalf("%+v: sync %d: newly %d, error %v", layout, i, newly, err)
			}
		}
		pick()
		m.GuestWrite(0, 1)
		if err := tracker.Sync(); err != nil {
			t.Fatal(err)
		}
		if got := tracker.Dirtied(); got != 4 {
			t.Errorf("%+v: dirtied %d, want 4", layout, got)
		}
	}
}

func TestTrackingMustBeOn(t *testing.T) {
	m := newMemory(t, manual, 64)
	tracker, err := migrate.NewTracker(m.Slots(), m, 6)
	if err != nil {
		t.Fatal(err)
	}
	off := func(when string) {
		t.Helper()
		_, _, pickErr := tracker.Pick(0, 0, 64, make([]uint64, 1))
		for _, err := range []error{tracker.Sync(), pickErr, tracker.BeginHintEpoch(1)} {
			if err == nil || !strings.Contains(err.Error(), "dirty tracking is not on") {
				t.Errorf("%s: error %v", when, err)
			}
		}
	}
	off("before the start")
	if err := tracker.Start(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(tracker.Stop(), tracker.Stop()); err != nil {
		t.Fatal(err)
	}
	off("after the stop")

	// A second start resets everything.
	if err := tracker.Start(); err != nil {
		t.Fatal(err)
	}
	if got := tracker.Remaining(); got != 64 {
		t.Errorf("%d pages remain after the second start", got)
	}
}

func TestAFailedStartLeavesTrackingOff(t *testing.T) {
	m := newMemory(t, manual, 64)
	tracker, err := migrate.NewTracker(m.Slots(), m, 6)
	if err != nil {
		t.Fatal(err)
	}
	m.Hooks.FailFetch = func(int) error { return errInjected }
	if err := tracker.Start(); !errors.Is(err, errInjected) {
		t.Fatalf("error %v", err)
	}
	if m.Logging() {
		t.Error("the log is on")
	}
}

// What a failing call consumed, or may have consumed, is sent: nothing is lost, and nothing
// counts as done that was not.
func TestErrorsOfTheLogLoseNothing(t *testing.T) {
	for _, c := range []struct {
		name   string
		layout simtest.Layout
		fail   func(*simtest.Hooks, func() error)
		want   uint64 // pages that remain after the failure
	}{
		{"GET, manual", manual, func(h *simtest.Hooks, f func() error) { h.FailFetch = func(int) error { return f() } }, 1},
		{"GET that clears", simtest.Layout{}, func(h *simtest.Hooks, f func() error) { h.FailFetch = func(int) error { return f() } }, 64},
		{"VMM's log", manual, func(h *simtest.Hooks, f func() error) { h.FailFetchVMM = func(int) error { return f() } }, 64},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMemory(t, c.layout, 64)
			tracker := newTracker(t, m, 6)
			if _, _, err := tracker.Pick(0, 0, 64, make([]uint64, 1)); err != nil {
				t.Fatal(err)
			}
			m.GuestWrite(0, 5)
			m.DeviceWrite(0, 6)()
			failing := true
			c.fail(&m.Hooks, func() error {
				if failing {
					return errInjected
				}
				return nil
			})
			if err := tracker.Sync(); !errors.Is(err, errInjected) {
				t.Fatalf("error %v", err)
			}
			if got := tracker.Remaining(); got != c.want {
				t.Errorf("%d pages remain after the failure, want %d", got, c.want)
			}
			failing = false
			if err := tracker.Sync(); err != nil {
				t.Fatal(err)
			}
			picked := make([]uint64, 1)
			if _, _, err := tracker.Pick(0, 0, 64, picked); err != nil || picked[0]&(1<<5|1<<6) != 1<<5|1<<6 {
				t.Errorf("picked %#x, error %v", picked[0], err)
			}
		})
	}
}

func TestAFailedClearPicksNothing(t *testing.T) {
	m := newMemory(t, manual, 192)
	tracker := newTracker(t, m, 6)
	picked := make([]uint64, 3)
	pick := func() (uint64, error) {
		_, n, err := tracker.Pick(0, 0, 192, picked)
		return n, err
	}
	if _, err := pick(); err != nil {
		t.Fatal(err)
	}
	for _, page := range []uint64{5, 130} { // two chunks, with one between them that has nothing to clear
		m.GuestWrite(0, page)
	}
	if err := tracker.Sync(); err != nil {
		t.Fatal(err)
	}
	var calls int
	m.Hooks.FailClear = func(int, uint64, uint64) error {
		if calls++; calls == 2 {
			return errInjected
		}
		return nil
	}
	if n, err := pick(); n != 0 || !errors.Is(err, errInjected) {
		t.Fatalf("n %d, error %v", n, err)
	}
	if got := tracker.Remaining(); got != 2 {
		t.Errorf("%d pages remain after the failure, want 2", got)
	}
	if _, err := pick(); err != nil || tracker.Remaining() != 0 {
		t.Errorf("%d pages remain after the second pick, error %v", tracker.Remaining(), err)
	}
	if picked[0] != 1<<5 || picked[2] != 1<<2 {
		t.Errorf("picked %x", picked)
	}
	if calls != 3 { // chunk 0 was cleared by the first attempt
		t.Errorf("%d CLEARs", calls)
	}
}

func TestNeighbouringChunksTakeOneClear(t *testing.T) {
	m := newMemory(t, simtest.Layout{ManualProtect: true, InitiallySet: true}, 1000)
	tracker := newTracker(t, m, 6)
	var calls [][2]uint64
	m.Hooks.FailClear = func(_ int, first, n uint64) error {
		calls = append(calls, [2]uint64{first, n})
		return nil
	}
	if _, n, err := tracker.Pick(0, 0, 1024, make([]uint64, 16)); n != 1000 || err != nil {
		t.Fatalf("n %d, error %v", n, err)
	}
	if len(calls) != 1 || calls[0] != [2]uint64{0, 1000} {
		t.Errorf("CLEARs %v", calls)
	}
}

// stillLog is a log without writes, so that only the tracker allocates.
type stillLog struct{ bits uint64 }

func (l *stillLog) StartDirtyLog() error                              { return nil }
func (l *stillLog) StopDirtyLog() error                               { return nil }
func (l *stillLog) ClearDirtyLog(int, uint64, uint64, []uint64) error { return nil }
func (l *stillLog) ManualProtect() bool                               { return true }
func (l *stillLog) FetchVMMDirty(int, func(int, uint64)) error        { return nil }
func (l *stillLog) FetchDirtyLog(_ int, bitmap []uint64) error {
	for i := range bitmap {
		bitmap[i] = l.bits
	}
	return nil
}

// Bits past the end of a slot are ignored.
func TestBitsPastTheEndAreIgnored(t *testing.T) {
	log := &stillLog{}
	slots := []migrate.Slot{{Pages: 70}}
	tracker, err := migrate.NewTracker(slots, log, 6)
	if err != nil {
		t.Fatal(err)
	}
	if err := tracker.Start(); err != nil {
		t.Fatal(err)
	}
	picked := []uint64{0, 0}
	if _, _, err := tracker.Pick(0, 0, 128, picked); err != nil {
		t.Fatal(err)
	}
	log.bits = ^uint64(0)
	if newly, err := tracker.SyncSlot(0); newly != 70 || tracker.Remaining() != 70 || err != nil {
		t.Errorf("newly %d, %d pages remain, error %v", newly, tracker.Remaining(), err)
	}
	if _, n, err := tracker.Pick(0, 0, 128, picked); n != 70 || picked[1] != 1<<6-1 || err != nil {
		t.Errorf("picked %d pages, %#x, error %v", n, picked, err)
	}
	if got := tracker.Remaining(); got != 0 {
		t.Errorf("%d pages remain", got)
	}
}

func TestRoundsDoNotAllocate(t *testing.T) {
	tracker, err := migrate.NewTracker([]migrate.Slot{{Pages: 4096}, {GPA: 4096 * 4096, Pages: 4096}}, &stillLog{0x5555}, 6)
	if err != nil {
		t.Fatal(err)
	}
	if err := tracker.Start(); err != nil {
		t.Fatal(err)
	}
	picked := make([]uint64, 16)
	var id uint32
	if n := migrate.LeastAllocs(func() {
		id++
		err := errors.Join(tracker.Sync(), tracker.BeginHintEpoch(id))
		for slot := range 2 {
			_, syncErr := tracker.SyncSlot(slot)
			err = errors.Join(err, syncErr)
			for from, n := uint64(0), uint64(1); n > 0; from += n {
				from, n, _ = tracker.Pick(slot, from, 1024, picked)
				tracker.Hint(id, slot, from, 10)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations a round", n)
	}
}

// Writers, a sender, a syncer and the hint path at one time, under the race detector: what
// was sent is right.
func TestTrackerUnderConcurrentUse(t *testing.T) {
	for _, layout := range []simtest.Layout{{}, {ManualProtect: true}, {ManualProtect: true, InitiallySet: true}} {
		const pages = 2000
		src, dst := newMemory(t, layout, pages, 300), newMemory(t, layout, pages, 300)
		tracker := newTracker(t, src, 7)
		slotPages := []uint64{pages, 300}

		var writers sync.WaitGroup
		for cpu := range uint64(2) {
			writers.Go(func() {
				r := rand.New(rand.NewPCG(cpu, 3))
				for range 20000 {
					slot := r.IntN(2)
					page := r.Uint64N(slotPages[slot])
					switch r.IntN(10) {
					case 0:
						src.DeviceWrite(slot, page)()
					case 1:
						src.KernelWrite(slot, page)()
					case 2:
						src.GuestZero(slot, page)
					default:
						src.GuestWrite(slot, page)
					}
				}
			})
		}
		done := make(chan struct{})
		var helpers sync.WaitGroup
		helpers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := tracker.Sync(); err != nil {
					t.Error(err)
				}
				tracker.Remaining()
				tracker.Dirtied()
			}
		})
		helpers.Go(func() {
			for id := uint32(1); ; id++ {
				select {
				case <-done:
					return
				default:
				}
				if err := tracker.BeginHintEpoch(id); err != nil {
					t.Error(err)
				}
				// Only for contention: this guest frees nothing.
				tracker.Hint(id-1, 0, 0, pages)
				tracker.EndHintEpoch()
			}
		})
		send := func() {
			picked := make([]uint64, 4)
			for slot := range slotPages {
				for from := uint64(0); ; {
					first, n, err := tracker.Pick(slot, from, 256, picked)
					if err != nil || n == 0 {
						if err != nil {
							t.Error(err)
						}
						break
					}
					for i := range n {
						if picked[i/64]>>(i%64)&1 != 0 {
							copy(dst.Bytes(slot, first+i, 1), src.Bytes(slot, first+i, 1))
						}
					}
					from = first + n
				}
			}
		}
		running := make(chan struct{})
		go func() { writers.Wait(); close(running) }()
		for on := true; on; {
			send()
			select {
			case <-running:
				on = false
			default:
			}
		}
		close(done)
		helpers.Wait()
		if err := tracker.Sync(); err != nil {
			t.Fatal(err)
		}
		send()
		for _, l := range simtest.Compare(src, dst) {
			t.Errorf("%+v: %v", layout, l)
		}
	}
}

// One GiB of which every 16th page was written, per round.
func BenchmarkRound(b *testing.B) {
	const pages = 1 << 18
	tracker, err := migrate.NewTracker([]migrate.Slot{{Pages: pages}}, &stillLog{0x0001000100010001}, 18)
	if err != nil {
		b.Fatal(err)
	}
	if err := tracker.Start(); err != nil {
		b.Fatal(err)
	}
	picked := make([]uint64, 16)
	b.SetBytes(pages * mempage.Size)
	for b.Loop() {
		if err := tracker.Sync(); err != nil {
			b.Fatal(err)
		}
		for from, n := uint64(0), uint64(1); n > 0; from += n {
			if from, n, err = tracker.Pick(0, from, 1024, picked); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkSync(b *testing.B) {
	const pages = 1 << 18
	tracker, err := migrate.NewTracker([]migrate.Slot{{Pages: pages}}, &stillLog{}, 18)
	if err != nil {
		b.Fatal(err)
	}
	if err := tracker.Start(); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(pages * mempage.Size)
	for b.Loop() {
		if err := tracker.Sync(); err != nil {
			b.Fatal(err)
		}
	}
}
