package migrate_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
	"golang.org/x/sys/unix"
)

// schedLog is the dirty log of the scheduler's tests: it does what simtest.Memory does,
// in bitmaps and without memory, so that millions of steps take seconds.
// [TestSchedLogIsTheSimulatedKVM] compares the two; tests of package kvm check the
// semantics on the real kernel.
//
// It belongs to one goroutine. Before each thing that the kernel does it calls
// pause, in which the guest may write.
type schedLog struct {
	manual, initiallySet bool
	slots                []schedSlot
	taken                []uint64 // scratch of a CLEAR
	clearing             int      // the slot of the CLEAR under way, -1 for none

	pause func()
	// did, if set, gets what was done, for a printed schedule. bits begin at page first.
	did func(what string, slot int, first uint64, bits []uint64)
}

type schedSlot struct {
	pages uint64
	dirty []uint64 // in KVM's log
	armed []uint64 // the next guest write faults, and sets dirty
	vmm   []uint64 // in the VMM's log
}

func newSchedLog(manual, initiallySet bool, pages ...uint64) *schedLog {
	l := &schedLog{manual: manual, initiallySet: initiallySet, clearing: -1, pause: func() {}}
	for _, n := range pages {
		words := (n + 63) / 64
		l.slots = append(l.slots, schedSlot{n, make([]uint64, words), make([]uint64, words), make([]uint64, words)})
		if words > uint64(len(l.taken)) {
			l.taken = make([]uint64, words)
		}
	}
	return l
}

// layout lists the slots for the tracker.
func (l *schedLog) layout() []migrate.Slot {
	slots := make([]migrate.Slot, len(l.slots))
	var gpa uint64
	for i, s := range l.slots {
		slots[i] = migrate.Slot{GPA: gpa, Pages: s.pages}
		gpa += s.pages * mempage.Size
	}
	return slots
}

// guestWrite is what a vCPU's store does to the log.
func (l *schedLog) guestWrite(slot int, page uint64) {
	s := &l.slots[slot]
	bit := uint64(1) << (page % 64)
	if s.armed[page/64]&bit != 0 {
		s.armed[page/64] &^= bit
		s.dirty[page/64] |= bit
	}
}

// deviceMark is the VMM's mark, after a write of its own has landed.
func (l *schedLog) deviceMark(slot int, page uint64) {
	l.slots[slot].vmm[page/64] |= 1 << (page % 64)
}

// ManualProtect implements [migrate.DirtyLog].
func (l *schedLog) ManualProtect() bool { return l.manual }

// StartDirtyLog implements [migrate.DirtyLog]. Unlike KVM's log it is reset if it is on, so
// that a run can follow another.
func (l *schedLog) StartDirtyLog() error {
	for i := range l.slots {
		s := &l.slots[i]
		clear(s.dirty)
		clear(s.armed)
		clear(s.vmm)
		set := s.armed
		if l.initiallySet {
			set = s.dirty
		}
		for page := uint64(0); page < s.pages; page += 64 {
			set[page/64] = ^uint64(0) >> (64 - min(64, s.pages-page))
		}
	}
	return nil
}

// StopDirtyLog implements [migrate.DirtyLog].
func (l *schedLog) StopDirtyLog() error {
	for i := range l.slots {
		clear(l.slots[i].dirty)
		clear(l.slots[i].armed)
	}
	return nil
}

// FetchDirtyLog implements [migrate.DirtyLog]: KVM_GET_DIRTY_LOG.
func (l *schedLog) FetchDirtyLog(slot int, bitmap []uint64) error {
	l.pause()
	s := &l.slots[slot]
	copy(bitmap, s.dirty)
	l.tell("GET reports", slot, 0, bitmap)
	if !l.manual {
		clear(s.dirty)
		l.arm(slot, 0, bitmap)
	}
	return nil
}

// ClearDirtyLog implements [migrate.DirtyLog]: KVM_CLEAR_DIRTY_LOG clears the
// bits that are set both in bitmap and in the log, then arms their pages.
func (l *schedLog) ClearDirtyLog(slot int, first, n uint64, bitmap []uint64) error {
	s := &l.slots[slot]
	if !l.manual || first%64 != 0 || first >= s.pages || n == 0 || n > s.pages-first ||
		n%64 != 0 && first+n != s.pages || uint64(len(bitmap)) != (n+63)/64 {
		return fmt.Errorf("KVM_CLEAR_DIRTY_LOG slot %d pages [%#x,+%#x) with %d words: %w", slot, first, n, len(bitmap), unix.EINVAL)
	}
	l.clearing = slot
	defer func() { l.clearing = -1 }()
	l.pause()
	taken := l.taken[:len(bitmap)]
	for i := range bitmap {
		w := first/64 + uint64(i)
		taken[i] = bitmap[i] & s.dirty[w]
		s.dirty[w] &^= bitmap[i]
	}
	l.tell("CLEAR takes", slot, first, taken)
	l.arm(slot, first, taken)
	return nil
}

// arm arms the pages that were cleared. A guest's write before that is not recorded, like
// one through a stale TLB entry; one after it is.
func (l *schedLog) arm(slot int, first uint64, bits []uint64) {
	l.pause()
	s := &l.slots[slot]
	for i, word := range bits {
		s.armed[first/64+uint64(i)] |= word
	}
	l.tell("armed again are", slot, first, bits)
	l.pause()
}

// FetchVMMDirty implements [migrate.DirtyLog].
func (l *schedLog) FetchVMMDirty(slot int, each func(int, uint64)) error {
	l.pause()
	s := &l.slots[slot]
	l.tell("VMM's log has", slot, 0, s.vmm)
	for w, word := range s.vmm {
		if word != 0 {
			s.vmm[w] = 0
			each(w, word)
		}
	}
	l.pause()
	return nil
}

func (l *schedLog) tell(what string, slot int, first uint64, bits []uint64) {
	if l.did != nil {
		l.did(what, slot, first, bits)
	}
}

// schedLog and simtest.Memory report the same for the same operations.
func TestSchedLogIsTheSimulatedKVM(t *testing.T) {
	pages := []uint64{130, 64}
	for _, mode := range []struct{ manual, initiallySet bool }{{false, false}, {true, false}, {true, true}} {
		r := rand.New(rand.NewPCG(1, 1))
		for range 40 {
			l := newSchedLog(mode.manual, mode.initiallySet, pages...)
			m := newMemory(t, simtest.Layout{ManualProtect: mode.manual, InitiallySet: mode.initiallySet}, pages...)
			must(t, l.StartDirtyLog(), m.StartDirtyLog())
			at := func() (int, uint64) {
				slot := r.IntN(len(pages))
				return slot, r.Uint64N(pages[slot])
			}
			for range 60 {
				slot, page := at()
				inWindow, windowPage := at() // is written while a CLEAR, or a GET that clears, is half done
				pauses := 0
				l.pause = func() {
					if pauses++; pauses == 2 {
						l.guestWrite(inWindow, windowPage)
					}
				}
				m.Hooks.Window = func(int, uint64, uint64) { m.GuestWrite(inWindow, windowPage) }
				switch a, b := make([]uint64, (pages[slot]+63)/64), make([]uint64, (pages[slot]+63)/64); r.IntN(6) {
				case 0, 1:
					l.guestWrite(slot, page)
					m.GuestWrite(slot, page)
				case 2:
					l.deviceMark(slot, page)
					m.DeviceWrite(slot, page)()
				case 3:
					if mode.manual {
						l.pause = func() {}
					}
					must(t, l.FetchDirtyLog(slot, a), m.FetchDirtyLog(slot, b))
					if !slices.Equal(a, b) {
						t.Fatalf("%+v: GET %x, simulated %x", mode, a, b)
					}
				case 4:
					l.pause = func() {}
					must(t, l.FetchVMMDirty(slot, func(w int, word uint64) { a[w] = word }),
						m.FetchVMMDirty(slot, func(w int, word uint64) { b[w] = word }))
					if !slices.Equal(a, b) {
						t.Fatalf("%+v: VMM's %x, simulated %x", mode, a, b)
					}
				case 5:
					first := page &^ 63
					n := min(64, pages[slot]-first)
					bits := []uint64{r.Uint64()}
					la, ma := l.ClearDirtyLog(slot, first, n, bits), m.ClearDirtyLog(slot, first, n, bits)
					if (la == nil) != (ma == nil) || (la == nil) != mode.manual {
						t.Fatalf("%+v: CLEAR: %v, simulated %v", mode, la, ma)
					}
				}
				for slot := range pages {
					for page := range pages[slot] {
						s := &l.slots[slot]
						armed, dirty := m.Armed(slot, page)
						if armed != (s.armed[page/64]>>(page%64)&1 != 0) || dirty != (s.dirty[page/64]>>(page%64)&1 != 0) {
							t.Fatalf("%+v: slot %d page %d: armed %v, reported %v in the simulated KVM", mode, slot, page, armed, dirty)
						}
					}
				}
			}
		}
	}
}
