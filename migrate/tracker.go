package migrate

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"github.com/govmm/govmm/mempage"
)

// maxSlotPages is KVM's limit on the size of a memory slot
// (KVM_MEM_MAX_NR_PAGES in include/linux/kvm_host.h).
const maxSlotPages = 1<<31 - 1

// errNotTracking is returned by what needs the dirty log to be on.
var errNotTracking = errors.New("dirty tracking is not on")

// tracker knows which pages must still be sent, and ensures that every write to a
// page that has been sent is noticed. Its invariants (the property tests check them):
//
//   - fetched is part of toSend: a page whose KVM bit was reported and is not cleared
//     yet is still to be read. A page leaves toSend by [tracker.Pick], which clears
//     its chunk of fetched first, or by [tracker.Hint], which skips pages of fetched.
//   - So a CLEAR, which passes the bits of fetched and no others, clears no bit of a
//     page that is not read afterwards.
//   - A page that is not in fetched is armed (KVM reports its next write), or its KVM
//     bit is set (KVM reports it at the next fetch). So a page that is read after the
//     CLEAR is sent as it was at a moment after which every write is reported.
//
// Without manual protection a fetch clears and arms by itself, and fetched stays
// empty.
//
// All methods may be called from several goroutines. None of them allocates.
type tracker struct {
	log    DirtyLog
	shift  uint
	manual bool

	// mu guards every field below. It is held over every call into the dirty log:
	// fetch and clear of a slot never overlap, and no page is picked or hinted
	// between a fetch and its booking. It is not held over network I/O.
	mu        sync.Mutex
	slots     []slotBits
	tracking  bool
	remaining uint64         // pages in all toSend
	dirtied   uint64         // pages that all fetches reported as newly written
	kvmBits   mempage.Bitmap // scratch of a fetch, as long as the largest slot
	vmmBits   mempage.Bitmap
	hints     hintEpoch
}

// slotBits is the tracker's record of one slot.
type slotBits struct {
	pages     uint64
	remaining uint64 // pages in toSend

	toSend       mempage.Bitmap // the content must still be sent
	fetched      mempage.Bitmap // KVM reported the page, and no CLEAR has followed
	uncleared    mempage.Bitmap // one bit for each chunk: fetched has a bit in it
	writtenSince mempage.Bitmap // a write was reported since the hint epoch was announced
	hinted       mempage.Bitmap // a hint took the page out of toSend, and no fetch put it back
}

// newTracker makes a tracker of the slots, whose writes log reports. A CLEAR covers
// chunks of 2^shift pages, or a whole slot that is smaller. Nothing is tracked before
// [tracker.Start].
func newTracker(slots []Slot, log DirtyLog, shift uint) (*tracker, error) {
	if shift < minClearBitmapShift || shift > maxClearBitmapShift {
		return nil, fmt.Errorf("track memory: clear bitmap shift %d: must be between %d and %d",
			shift, minClearBitmapShift, maxClearBitmapShift)
	}
	t := &tracker{log: log, shift: shift, manual: log.ManualProtect(), slots: make([]slotBits, len(slots))}
	var longest uint64
	for i, slot := range slots {
		if slot.Pages == 0 || slot.Pages > maxSlotPages {
			return nil, fmt.Errorf("track memory: slot %d has %d pages: must be between 1 and %d", i, slot.Pages, uint64(maxSlotPages))
		}
		longest = max(longest, slot.Pages)
		t.slots[i] = slotBits{
			pages:        slot.Pages,
			toSend:       mempage.NewBitmap(slot.Pages),
			fetched:      mempage.NewBitmap(slot.Pages),
			uncleared:    mempage.NewBitmap((slot.Pages-1)>>shift + 1),
			writtenSince: mempage.NewBitmap(slot.Pages),
			hinted:       mempage.NewBitmap(slot.Pages),
		}
	}
	t.kvmBits, t.vmmBits = mempage.NewBitmap(longest), mempage.NewBitmap(longest)
	return t, nil
}

// Start turns the dirty log on and marks every page as to be sent. It fetches each
// slot once: with KVM_DIRTY_LOG_INITIALLY_SET no page is armed before a CLEAR, and a
// CLEAR needs bits that were fetched. After an error tracking is off.
func (t *tracker) Start() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.log.StartDirtyLog(); err != nil {
		return fmt.Errorf("start the dirty log: %w", err)
	}
	t.tracking = true
	t.remaining = 0
	t.hints = hintEpoch{}
	for i := range t.slots {
		s := &t.slots[i]
		clear(s.fetched)
		clear(s.uncleared)
		clear(s.writtenSince)
		clear(s.hinted)
		s.toSend.SetRange(0, s.pages)
		s.remaining = s.pages
		t.remaining += s.pages
	}
	for i := range t.slots {
		if _, err := t.fetch(i); err != nil {
			return errors.Join(err, t.stop())
		}
	}
	t.dirtied = 0
	return nil
}

// Stop turns the dirty log off, also if it is off. The record of what is to be sent
// stays until the next [tracker.Start].
func (t *tracker) Stop() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stop()
}

// stop needs mu.
func (t *tracker) stop() error {
	t.tracking = false
	t.hints.active = false
	if err := t.log.StopDirtyLog(); err != nil {
		return fmt.Errorf("stop the dirty log: %w", err)
	}
	return nil
}

// Sync fetches the writes that KVM and the VMM have recorded, for every slot. It only
// adds to what must be sent (R4). After an error no recorded write is lost, and the
// slots after the failing one have not been fetched.
func (t *tracker) Sync() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.slots {
		if _, err := t.fetch(i); err != nil {
			return err
		}
	}
	return nil
}

// SyncSlot is [tracker.Sync] for one slot. newly is the number of pages that were
// written since they were last armed and had not been reported yet.
func (t *tracker) SyncSlot(slot int) (newly uint64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.fetch(slot)
}

// fetch books what KVM's log and the VMM's have for the slot. It needs mu.
//
// Under manual protection every GET reports again a bit that was fetched and not
// cleared. It may be booked again: its page is in toSend anyway.
func (t *tracker) fetch(slot int) (newly uint64, err error) {
	s, err := t.slot("fetch the dirty log", slot)
	if err != nil {
		return 0, err
	}
	if !t.tracking {
		return 0, fmt.Errorf("fetch the dirty log of slot %d: %w", slot, errNotTracking)
	}
	kvm, vmm := t.kvmBits[:len(s.toSend)], t.vmmBits[:len(s.toSend)]
	clear(kvm)
	clear(vmm)
	kvmErr := t.log.FetchDirtyLog(slot, kvm)
	vmmErr := t.log.FetchVMMDirty(slot, vmm)
	if kvmErr != nil {
		// A GET that clears may have cleared bits that it failed to return; one that
		// does not clear has changed nothing.
		clear(kvm)
		if !t.manual {
			kvm.SetRange(0, s.pages)
		}
		kvmErr = fmt.Errorf("fetch KVM's dirty log of slot %d: %w", slot, kvmErr)
	}
	if vmmErr != nil {
		vmm.SetRange(0, s.pages)
		vmmErr = fmt.Errorf("fetch the VMM's dirty log of slot %d: %w", slot, vmmErr)
	}
	newly = t.book(s, kvm, vmm)
	t.dirtied += newly
	return newly, errors.Join(kvmErr, vmmErr)
}

// book ORs what was reported into the slot's bitmaps and returns how many of the pages
// are reported for the first time since they were armed. It needs mu.
func (t *tracker) book(s *slotBits, kvm, vmm mempage.Bitmap) (newly uint64) {
	var added, back int
	wordsShift := t.shift - 6 // a chunk is 2^wordsShift words
	for w := range kvm {
		k, v := kvm[w], vmm[w]
		if k|v == 0 {
			continue
		}
		inside := mempage.WordMask(uint64(w), 0, s.pages)
		k &= inside
		v &= inside
		all := k | v
		newly += uint64(bits.OnesCount64(k&^s.fetched[w] | v))
		added += bits.OnesCount64(all &^ s.toSend[w])
		s.toSend[w] |= all
		s.writtenSince[w] |= all
		back += bits.OnesCount64(all & s.hinted[w])
		s.hinted[w] &^= all
		if t.manual && k != 0 {
			s.fetched[w] |= k
			s.uncleared.Set(uint64(w) >> wordsShift)
		}
	}
	s.remaining += uint64(added)
	t.remaining += uint64(added)
	t.hints.stats.Returned += uint64(back)
	return newly
}

// Pick takes out of toSend the next pages of the slot at or after page from, which is
// rounded down to a multiple of 64. They lie in [first, first+n), and bit i of picked
// is set for each page first+i that was taken. first is a multiple of 64; n is too or
// ends the slot. n is at most max, a multiple of 64 for which picked has room, and 0 if
// nothing is left.
//
// The caller reads the pages, also to find zeros and holes, only after Pick has
// returned: from then on their writes are tracked again (R1). After an error no page
// was taken.
func (t *tracker) Pick(slot int, from, max uint64, picked []uint64) (first, n uint64, err error) {
	s, err := t.slot("pick pages", slot)
	if err != nil {
		return 0, 0, err
	}
	if max == 0 || max%mempage.WordBits != 0 || max/mempage.WordBits > uint64(len(picked)) {
		return 0, 0, fmt.Errorf("pick pages of slot %d: %d pages do not fit a bitmap of %d words", slot, max, len(picked))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.tracking {
		return 0, 0, fmt.Errorf("pick pages of slot %d: %w", slot, errNotTracking)
	}
	next := s.toSend.NextSet(from&^(mempage.WordBits-1), s.pages)
	if next >= s.pages {
		return s.pages, 0, nil
	}
	word := next / mempage.WordBits
	end := min(word+max/mempage.WordBits, uint64(len(s.toSend)))
	for s.toSend[end-1] == 0 {
		end--
	}
	first = word * mempage.WordBits
	n = min(end*mempage.WordBits, s.pages) - first
	if err := t.arm(slot, first, n); err != nil {
		return 0, 0, err
	}
	clear(picked[copy(picked, s.toSend[word:end]):])
	clear(s.toSend[word:end])
	taken := mempage.Bitmap(picked).Count()
	s.remaining -= taken
	t.remaining -= taken
	return first, n, nil
}

// arm clears, in KVM's log, the bits that were fetched in the chunks that [first,
// first+n) touches, and no others: a bit that was set after the fetch is a write that
// a later fetch must report (R2). Adjacent chunks take one CLEAR. After an error the
// record of the chunks that were not cleared is as before. It needs mu.
func (t *tracker) arm(slot int, first, n uint64) error {
	s := &t.slots[slot]
	chunk, end := first>>t.shift, (first+n-1)>>t.shift+1
	for {
		chunk = s.uncleared.NextSet(chunk, end)
		if chunk >= end {
			return nil
		}
		next := s.uncleared.NextClear(chunk, end)
		lo, hi := chunk<<t.shift, min(next<<t.shift, s.pages)
		fetched := s.fetched[lo/mempage.WordBits : mempage.Words(hi)]
		if err := t.log.ClearDirtyLog(slot, lo, hi-lo, fetched); err != nil {
			return fmt.Errorf("clear KVM's dirty log of slot %d pages [%#x,%#x): %w", slot, lo, hi, err)
		}
		clear(fetched)
		s.uncleared.ClearRange(chunk, next-chunk)
		chunk = next
	}
}

// Remaining is the number of pages in toSend.
func (t *tracker) Remaining() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.remaining
}

// SlotRemaining is [tracker.Remaining] of one slot.
func (t *tracker) SlotRemaining(slot int) uint64 {
	s, err := t.slot("count pages", slot)
	if err != nil {
		return 0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return s.remaining
}

// Dirtied is the number of pages that all fetches since [tracker.Start] reported as
// newly written; its growth is the dirty rate. It does not count writes to a page that
// was reported and is not armed again yet.
func (t *tracker) Dirtied() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.dirtied
}

// slot checks a slot's number.
func (t *tracker) slot(what string, slot int) (*slotBits, error) {
	if slot < 0 || slot >= len(t.slots) {
		return nil, fmt.Errorf("%s: slot %d of %d", what, slot, len(t.slots))
	}
	return &t.slots[slot], nil
}
