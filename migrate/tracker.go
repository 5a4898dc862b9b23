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

// errNotTracking is returned where the dirty log would have to be on.
var errNotTracking = errors.New("dirty tracking is not on")

// Tracker knows which pages must still be sent, and sees to it that no write
// to a page which was sent goes unnoticed. It holds four bitmaps for each
// slot, and this is always true of them (the property tests check it):
//
//   - fetched is part of toSend: a page whose KVM bit was reported and is not
//     cleared yet has its content still to be read. A page leaves toSend by
//     [tracker.Pick], which clears its chunk of fetched first, or by
//     [tracker.Hint], which leaves pages of fetched alone.
//   - So a CLEAR, which passes what is in fetched and nothing else, wipes the
//     bit of no page that is not going to be read afterwards.
//   - A page that is not in fetched is either armed (KVM reports its next
//     write) or its KVM bit is set already (KVM reports it at the next
//     fetch). So what is picked after the CLEAR and read after that is sent
//     as it was at some moment from which on every write is reported.
//
// Without manual protection a fetch clears and arms by itself, and fetched
// stays empty.
//
// All methods may be called from several goroutines. None of them allocates.
type tracker struct {
	log    DirtyLog
	shift  uint
	manual bool

	// mu guards every field below, and is held over every call into the dirty
	// log: fetch and clear of one slot never overlap, and no page is picked or
	// hinted between a fetch and its booking. It is not held while the network
	// is written to.
	mu        sync.Mutex
	slots     []slotBits
	tracking  bool
	remaining uint64         // pages in all toSend
	dirtied   uint64         // pages that all fetches so far reported as newly written
	kvmBits   mempage.Bitmap // scratch of a fetch, as long as the largest slot
	vmmBits   mempage.Bitmap
	hints     hintEpoch
}

// slotBits is what the tracker knows of one slot.
type slotBits struct {
	pages     uint64
	remaining uint64 // pages in toSend

	toSend       mempage.Bitmap // content must still be sent
	fetched      mempage.Bitmap // KVM reported it, and no CLEAR has followed
	uncleared    mempage.Bitmap // one bit a chunk: fetched has a bit in it
	writtenSince mempage.Bitmap // reported since the hint epoch was announced
	hinted       mempage.Bitmap // a hint took it out of toSend, and nothing put it back
}

// newTracker makes a tracker of the slots, whose writes log reports. A CLEAR
// covers chunks of 2^shift pages; a chunk that is larger than its slot is the
// whole slot. Nothing is tracked before [tracker.Start].
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

// Start turns write tracking on and makes every page one to be sent. It
// fetches each slot once: with KVM_DIRTY_LOG_INITIALLY_SET nothing is armed
// before a CLEAR, and a CLEAR needs bits that were fetched. After an error
// tracking is off.
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

// Stop turns write tracking off. What was still to be sent stays on record;
// a new [tracker.Start] begins afresh. It may be called when tracking is off.
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

// Sync fetches the writes that KVM and the VMM have recorded in every slot.
// It only adds to what must be sent. After an error nothing that was recorded
// is lost, and the slots after the failing one were not fetched.
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

// SyncSlot is [tracker.Sync] for one slot. newly is the number of pages that
// were written since they were last armed and had not been reported before.
func (t *tracker) SyncSlot(slot int) (newly uint64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.fetch(slot)
}

// fetch books what KVM's log and the VMM's have for the slot. It needs mu.
//
// A bit that is fetched and not cleared is reported again by every GET under
// manual protection, and may be booked again: its page is in toSend anyway.
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
		// A GET that clears may have cleared bits that it then failed to
		// hand over; one that does not has changed nothing.
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

// book ORs what was reported into the slot's bitmaps and returns how many of
// the pages are reported for the first time since they were armed. It needs mu.
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

// Pick takes the next pages that must be sent out of the slot, at or after
// page from, which is rounded down to a multiple of 64. The pages lie in
// [first, first+n), and bit i of picked tells whether page first+i is one of
// them. first is a multiple of 64; n is one too or ends the slot, and is at
// most max, which is a multiple of 64 and no more than picked has bits for.
// n is 0 when nothing is left there. The caller reads the pages' content,
// looks whether they are zero, or holes, after Pick has returned and not
// before: their writes are tracked again from then on.
//
// After an error no page was picked, and the pages stay to be sent.
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

// arm clears, in KVM's log, what was fetched in the chunks that [first,
// first+n) touches, and nothing else: a bit that was set after the fetch is a
// write which only a later fetch may report. Neighbouring chunks take one
// CLEAR. After an error the chunks that are not cleared are on record as
// before. It needs mu.
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

// Remaining is the number of pages that must still be sent, as far as the log
// has been fetched.
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

// Dirtied is the number of pages that all fetches since [tracker.Start]
// reported as newly written: its growth over time is the dirty rate. Writes
// to a page that was reported and is not armed again yet are not seen.
func (t *tracker) Dirtied() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.dirtied
}

// slot checks a slot's number.
func (t *tracker) slot(what string, slot int) (*slotBits, error) {
	if slot < 0 || slot >= len(t.slots) {
		return nil, fmt.Errorf("%s: there is no slot %d among %d", what, slot, len(t.slots))
	}
	return &t.slots[slot], nil
}
