package migrate

import (
	"errors"
	"fmt"
	"math/bits"

	"github.com/govmm/govmm/mempage"
)

// errNoEpoch: an id cannot name a new epoch.
var errNoEpoch = errors.New("the id is that of the hint epoch before")

// hintEpoch is the tracker's record of free-page hints, guarded by tracker.mu. An
// epoch is the life of one virtio-balloon command id, from just before it is announced
// to the guest until it is withdrawn.
type hintEpoch struct {
	active bool
	used   bool   // id has named an epoch since Start
	id     uint32 // of the epoch, or of the last one
	stats  hintStats
}

// hintStats counts hinted pages since [tracker.Start].
type hintStats struct {
	Taken    uint64 // a hint took them out of what must be sent
	Returned uint64 // of Taken: put back by a fetch, since they were written later
	Written  uint64 // named by a hint, and still sent: written since the announcement
	Stale    uint64 // named by a hint with another id than the current one
}

// BeginHintEpoch prepares the tracker for hints under a command id. It is called before
// the id is announced: a hint is safe only because every write from the announcement on
// is reported (R3).
//
// It fetches every slot and clears all that was fetched, so that each page is armed (or
// its bit is set and not fetched yet), and then empties writtenSince. A hint may take
// out a page that was written and fetched before the announcement: the guest hints it
// after it saw the id, so it has given up what it wrote.
//
// The id must differ from that of the epoch before, of which hints may come late. After
// an error there is no epoch, and no hint counts.
func (t *tracker) BeginHintEpoch(id uint32) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.hints.active = false
	if !t.tracking {
		return fmt.Errorf("begin hint epoch %d: %w", id, errNotTracking)
	}
	if t.hints.used && t.hints.id == id {
		return fmt.Errorf("begin hint epoch %d: %w", id, errNoEpoch)
	}
	if err := t.sync(); err != nil {
		return fmt.Errorf("begin hint epoch %d: %w", id, err)
	}
	// Again, if another fetch came while mu was free during a CLEAR.
	for left := true; left; {
		left = false
		for i := range t.slots {
			if err := t.arm(i, 0, t.slots[i].pages); err != nil {
				return fmt.Errorf("begin hint epoch %d: %w", id, err)
			}
		}
		for i := range t.slots {
			left = left || t.uncleared(&t.slots[i], 0, t.slots[i].pages)
		}
	}
	for i := range t.slots {
		t.slots[i].writtenSince.Clear()
	}
	t.hints.active, t.hints.used, t.hints.id = true, true, id
	return nil
}

// Hint takes pages [first, first+n) of the slot, which the guest says are free, out of
// toSend, and returns how many it took. A page stays if a fetch since the announcement
// reported it: the guest may have taken it back and written it after it queued the
// hint. A page that was written and is not reported yet is taken out, and the next
// fetch puts it back.
//
// Within an epoch fetched is part of writtenSince, since it was empty when the epoch
// began. Hint nevertheless checks both.
//
// Only hints under the id of the current epoch count. The range comes from the guest:
// what lies outside the slot is ignored.
func (t *tracker) Hint(id uint32, slot int, first, n uint64) (taken uint64) {
	return t.HintBatch(id, []pageRange{{slot, first, n}})
}

// HintBatch is [tracker.Hint] of many ranges, under the mutex at once: the caller bounds
// the pages of a batch.
func (t *tracker) HintBatch(id uint32, ranges []pageRange) (taken uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	current := t.hints.active && t.hints.id == id
	for _, r := range ranges {
		s, err := t.slot("hint pages", r.slot)
		if err != nil || r.first >= s.pages {
			continue
		}
		n := min(r.n, s.pages-r.first)
		if !current {
			t.hints.stats.Stale += n
			continue
		}
		taken += t.hint(s, r.first, n)
	}
	t.remaining -= taken
	t.hints.stats.Taken += taken
	return taken
}

// hint takes what it may of [first, first+n) out of toSend. It needs mu.
func (t *tracker) hint(s *slotBits, first, n uint64) (taken uint64) {
	var left int
	for w := first / mempage.WordBits; w*mempage.WordBits < first+n; w++ {
		named := s.toSend.Bitmap[w] & mempage.WordMask(w, first, first+n)
		free := named &^ s.writtenSince.Bitmap[w] &^ s.fetched[w]
		s.toSend.Bitmap[w] &^= free
		s.hinted.OrWord(w, free)
		taken += uint64(bits.OnesCount64(free))
		left += bits.OnesCount64(named &^ free)
	}
	s.remaining -= taken
	t.hints.stats.Written += uint64(left)
	return taken
}

// hintedNow calls is for those of the pages that a hint took out and no fetch put back.
func (t *tracker) hintedNow(pages []pageRange, is func(i int)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, p := range pages {
		if s, err := t.slot("look at hints", p.slot); err == nil && p.first < s.pages &&
			s.hinted.Get(p.first) {
			is(i)
		}
	}
}

// maskHinted overwrites, in the hashes of [first, first+n), those of pages that a hint
// keeps off the wire.
func (t *tracker) maskHinted(slot int, first, n uint64, hashes []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	hinted := &t.slots[slot].hinted
	for p := hinted.NextSet(first, first+n); p < first+n; p = hinted.NextSet(p+1, first+n) {
		copy(hashes[(p-first)*hashSize:], hashUnknown[:])
	}
}

// EndHintEpoch ends the epoch: no further hint counts. What hints took out stays out
// until it is written. So the guest may learn that the device is done with its pages
// (DONE, virtio 1.2, 5.5.6.5) only when it runs at the destination, or stays at the
// source for good.
func (t *tracker) EndHintEpoch() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.hints.active = false
}

// HintStats returns the counters of the hints.
func (t *tracker) HintStats() hintStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.hints.stats
}
