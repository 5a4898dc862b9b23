package migrate

import (
	"errors"
	"fmt"
	"time"

	"github.com/govmm/govmm/mempage"
)

// Tracker, HintStats and NewTracker are for tests of package migrate_test.
type (
	Tracker   = tracker
	HintStats = hintStats
)

// NewTracker is newTracker.
func NewTracker(slots []Slot, log DirtyLog, shift uint) (*Tracker, error) {
	return newTracker(slots, log, shift)
}

// HurryGuard makes the guard's time least, whatever the limit, and the next stop come at once.
func (m *Migration) HurryGuard(least time.Duration) { m.guard = guardTimes{least: least} }

// LimitKeys makes the key of a TLS connection good for n bytes.
func (m *Migration) LimitKeys(n uint64) { m.peer.tls.limit = n }

// LimitKeys makes the key of a TLS connection good for n bytes.
func (r *Receiver) LimitKeys(n uint64) { r.keyLimit = n }

// Check checks the invariants of the tracker's bitmaps. armed reports for a page whether
// KVM will report its next write, or has a report that was not fetched yet.
func (t *tracker) Check(armed func(slot int, page uint64) bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var total uint64
	for i := range t.slots {
		s := &t.slots[i]
		for _, b := range []struct {
			name string
			bits mempage.Bitmap
			size uint64
		}{
			{"toSend", s.toSend.Bitmap, s.pages}, {"fetched", s.fetched, s.pages}, {"writtenSince", s.writtenSince.Bitmap, s.pages},
			{"hinted", s.hinted.Bitmap, s.pages}, {"uncleared", s.uncleared, (s.pages-1)>>t.shift + 1},
		} {
			if past := b.bits.NextSet(b.size, b.bits.Bits()); past < b.bits.Bits() {
				return fmt.Errorf("slot %d: bit %d of %s is past the end", i, past, b.name)
			}
		}
		for w := range s.toSend.Bitmap {
			if s.fetched[w]&^s.toSend.Bitmap[w] != 0 {
				return fmt.Errorf("slot %d word %d: fetched %#x is not part of toSend %#x", i, w, s.fetched[w], s.toSend.Bitmap[w])
			}
			if s.hinted.Bitmap[w]&(s.toSend.Bitmap[w]|s.fetched[w]) != 0 {
				return fmt.Errorf("slot %d word %d: pages hinted away are still to be sent or fetched", i, w)
			}
		}
		for c := range (s.pages-1)>>t.shift + 1 {
			if has := s.fetched.Any(c<<t.shift, 1<<t.shift); has != s.uncleared.Get(c) {
				return fmt.Errorf("slot %d chunk %d: fetched has bits: %v, uncleared says %v", i, c, has, s.uncleared.Get(c))
			}
		}
		if !t.manual && s.fetched.Count() != 0 {
			return fmt.Errorf("slot %d: fetched is not empty without manual protection", i)
		}
		if s.remaining != s.toSend.Count() {
			return fmt.Errorf("slot %d: %d pages remain, counted %d", i, s.toSend.Count(), s.remaining)
		}
		total += s.remaining
		for page := range s.pages {
			if t.tracking && !s.fetched.Get(page) && !armed(i, page) {
				return fmt.Errorf("slot %d page %#x: neither fetched nor armed", i, page)
			}
		}
	}
	if t.remaining != total {
		return fmt.Errorf("%d pages remain, counted %d", total, t.remaining)
	}
	if st := t.hints.stats; st.Returned > st.Taken {
		return errors.New("more hinted pages came back than were taken")
	}
	return nil
}

// InToSend reports whether a page's content must still be sent.
func (t *tracker) InToSend(slot int, page uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.slots[slot].toSend.Get(page)
}

// ToSend is a copy of the slot's toSend.
func (t *tracker) ToSend(slot int) []uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]uint64(nil), t.slots[slot].toSend.Bitmap...)
}

// The following methods break the tracker on purpose, each in one way, and a test shows
// what is lost.

// ForgetWritten empties writtenSince, as if R3 had no such bitmap.
func (t *tracker) ForgetWritten() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.slots {
		t.slots[i].writtenSince.Clear()
	}
}

// ForgetToSend empties toSend, as a sync does that overwrites instead of adding (against
// R4).
func (t *tracker) ForgetToSend() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.slots {
		s := &t.slots[i]
		t.remaining -= s.remaining
		s.remaining = 0
		s.toSend.Clear()
	}
}

// Drop takes pages out of toSend after they were read instead of before
// (against R4).
func (t *tracker) Drop(slot int, first uint64, picked []uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := &t.slots[slot]
	before := s.toSend.Count()
	s.toSend.Bitmap[first/mempage.WordBits:].AndNot(picked)
	gone := before - s.toSend.Count()
	s.remaining -= gone
	t.remaining -= gone
}

// BeginHintEpochUnarmed begins an epoch without arming what was fetched.
func (t *tracker) BeginHintEpochUnarmed(id uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.slots {
		t.slots[i].writtenSince.Clear()
	}
	t.hints.active, t.hints.used, t.hints.id = true, true, id
}

// HintAll takes hinted pages out although they are in fetched or were written since. With
// clearing it clears their chunks first, as QEMU does.
func (t *tracker) HintAll(id uint32, slot int, first, n uint64, clearing bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.hints.active || t.hints.id != id {
		return nil
	}
	if clearing {
		if err := t.arm(slot, first, n); err != nil {
			return err
		}
	}
	s := &t.slots[slot]
	before := s.toSend.Count()
	s.toSend.ClearRange(first, n)
	gone := before - s.toSend.Count()
	s.remaining -= gone
	t.remaining -= gone
	return nil
}

// HintEpoch is the current id, for hints whose own id is not checked.
func (t *tracker) HintEpoch() uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.hints.id
}
