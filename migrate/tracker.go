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
	bulk   BulkLog // log, if it is one
	shift  uint
	manual bool

	// mu guards every field below. It is held over every fetch: no page is picked or
	// hinted between a fetch and its booking. It is not held over a CLEAR, which may
	// take long, nor over network I/O.
	mu        lock
	cleared   sync.Cond // a slot's clearing has become false
	slots     []slotBits
	tracking  bool
	forgotten bool   // nothing is to be sent any more
	remaining uint64 // pages in all toSend
	dirtied   uint64 // pages that all fetches reported as newly written
	hints     hintEpoch

	// Of the fetch under way.
	kvmBits mempage.Bitmap           // scratch, as long as the largest slot
	into    *slotBits                // where it is booked
	kvm     mempage.Bitmap           // what KVM reported and is not booked yet
	newly   uint64                   // what fetch returns
	bookVMM func(w int, word uint64) // books a word of the VMM's log
	bookKVM func(w int, word uint64) // books a word of kvm
}

// lock is a mutex. One who waits for it waits as for a channel, which the fake clocks of
// tests understand: a fetch that takes long is made under it.
type lock chan struct{}

func (l lock) Lock()   { l <- struct{}{} }
func (l lock) Unlock() { <-l }

// slotBits is the tracker's record of one slot.
type slotBits struct {
	pages     uint64
	remaining uint64 // pages in toSend

	toSend       mempage.Sparse // the content must still be sent
	fetched      mempage.Bitmap // KVM reported the page, and no CLEAR has followed
	uncleared    mempage.Bitmap // one bit for each chunk: fetched has a bit in it
	writtenSince mempage.Sparse // a write was reported since the hint epoch was announced
	hinted       mempage.Sparse // a hint took the page out of toSend, and no fetch put it back

	// clearing is true during a CLEAR. Meanwhile fetched does not change: fetches of the
	// slot, and other CLEARs of it, wait. Pages of other chunks are picked and hinted.
	clearing bool
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
	t.bulk, _ = log.(BulkLog)
	t.mu = make(lock, 1)
	t.cleared.L = t.mu
	t.bookKVM = func(w int, word uint64) { t.bookWord(w, word, 0) }
	t.bookVMM = func(w int, word uint64) {
		var kvm uint64 // of the same pages, so that they count once
		if w < len(t.kvm) {
			kvm, t.kvm[w] = t.kvm[w], 0
		}
		t.bookWord(w, kvm, word)
	}
	var longest uint64
	for i, slot := range slots {
		if slot.Pages == 0 || slot.Pages > maxSlotPages {
			return nil, fmt.Errorf("track memory: slot %d has %d pages: must be between 1 and %d", i, slot.Pages, uint64(maxSlotPages))
		}
		longest = max(longest, slot.Pages)
		t.slots[i] = slotBits{
			pages:        slot.Pages,
			toSend:       mempage.NewSparse(slot.Pages),
			fetched:      mempage.NewBitmap(slot.Pages),
			uncleared:    mempage.NewBitmap((slot.Pages-1)>>shift + 1),
			writtenSince: mempage.NewSparse(slot.Pages),
			hinted:       mempage.NewSparse(slot.Pages),
		}
	}
	t.kvmBits = mempage.NewBitmap(longest)
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
		for chunk, end := uint64(0), s.uncleared.Bits(); ; chunk++ {
			if chunk = s.uncleared.NextSet(chunk, end); chunk == end {
				break
			}
			clear(s.fetched[chunk<<t.shift/mempage.WordBits : mempage.Words(min((chunk+1)<<t.shift, s.pages))])
		}
		clear(s.uncleared)
		s.writtenSince.Clear()
		s.hinted.Clear()
		s.toSend.SetRange(0, s.pages)
		s.remaining = s.pages
		t.remaining += s.pages
	}
	if err := t.sync(); err != nil {
		return errors.Join(err, t.stop())
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
	for i := range t.slots {
		t.awaitClear(&t.slots[i])
	}
	if err := t.log.StopDirtyLog(); err != nil {
		return fmt.Errorf("stop the dirty log: %w", err)
	}
	return nil
}

// Forget forgets what is to be sent, for good: the guest resets itself, and its memory
// means nothing any more.
func (t *tracker) Forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.forgotten, t.remaining = true, 0
	for i := range t.slots {
		clear(t.slots[i].toSend.Bitmap)
		t.slots[i].remaining = 0
	}
}

// awaitClear returns when no CLEAR of the slot is under way. It needs mu, and may let go
// of it meanwhile.
func (t *tracker) awaitClear(s *slotBits) {
	for s.clearing {
		t.cleared.Wait()
	}
}

// Sync fetches the writes that KVM and the VMM have recorded, for every slot. It only
// adds to what must be sent (R4). After an error no recorded write is lost, and the
// slots after the failing one have not been fetched.
func (t *tracker) Sync() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.sync()
}

// sync needs mu.
func (t *tracker) sync() error {
	if t.forgotten {
		return nil
	}
	if t.bulk != nil && t.tracking {
		if err := t.bulk.BeginSync(); err != nil {
			return fmt.Errorf("fetch the dirty log: %w", err)
		}
	}
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
	t.awaitClear(s)
	if !t.tracking {
		return 0, fmt.Errorf("fetch the dirty log of slot %d: %w", slot, errNotTracking)
	}
	if t.forgotten {
		return 0, nil
	}
	t.into, t.kvm, t.newly = s, nil, 0
	var done bool
	var kvmErr error
	if t.bulk != nil {
		done, kvmErr = t.bulk.TakeDirtyLog(slot, t.bookKVM)
	}
	if !done && kvmErr == nil {
		t.kvm = t.kvmBits[:len(s.fetched)]
		kvmErr = t.log.FetchDirtyLog(slot, t.kvm)
	}
	if kvmErr != nil {
		// A GET that clears may have cleared bits that it failed to return; one that
		// does not clear has changed nothing.
		t.kvm = t.kvmBits[:len(s.fetched)]
		clear(t.kvm)
		if !t.manual {
			t.kvm.SetRange(0, s.pages)
		}
		kvmErr = fmt.Errorf("fetch KVM's dirty log of slot %d: %w", slot, kvmErr)
	}
	vmmErr := t.log.FetchVMMDirty(slot, t.bookVMM)
	if vmmErr != nil {
		for w := range s.fetched {
			t.bookVMM(w, ^uint64(0))
		}
		vmmErr = fmt.Errorf("fetch the VMM's dirty log of slot %d: %w", slot, vmmErr)
	}
	t.kvm.EachWord(t.bookKVM)
	t.dirtied += t.newly
	return t.newly, errors.Join(kvmErr, vmmErr)
}

// bookWord ORs words of KVM's log and of the VMM's, of the same pages, into the slot's
// bitmaps. newly grows by the pages that are reported for the first time since they were
// armed. It needs mu.
func (t *tracker) bookWord(at int, kvm, vmm uint64) {
	s, w := t.into, uint64(at)
	if w >= uint64(len(s.fetched)) {
		return
	}
	inside := mempage.WordMask(w, 0, s.pages)
	kvm &= inside
	vmm &= inside
	all := kvm | vmm
	t.newly += uint64(bits.OnesCount64(kvm&^s.fetched[w] | vmm))
	added := uint64(bits.OnesCount64(all &^ s.toSend.Bitmap[w]))
	s.toSend.OrWord(w, all)
	s.remaining += added
	t.remaining += added
	s.writtenSince.OrWord(w, all)
	if back := all & s.hinted.Bitmap[w]; back != 0 {
		t.hints.stats.Returned += uint64(bits.OnesCount64(back))
		s.hinted.Bitmap[w] &^= back
	}
	if t.manual && kvm != 0 {
		s.fetched[w] |= kvm
		s.uncleared.Set(w >> (t.shift - 6)) // a chunk has 2^(shift-6) words
	}
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
	return t.PickBefore(slot, from, maxSlotPages, max, picked)
}

// PickBefore is [tracker.Pick] of pages before page end, a multiple of 64 or not before
// the slot's end.
func (t *tracker) PickBefore(slot int, from, end, max uint64, picked []uint64) (first, n uint64, err error) {
	s, err := t.slot("pick pages", slot)
	if err != nil {
		return 0, 0, err
	}
	if max == 0 || max%mempage.WordBits != 0 || max/mempage.WordBits > uint64(len(picked)) {
		return 0, 0, fmt.Errorf("pick pages of slot %d: %d pages do not fit a bitmap of %d words", slot, max, len(picked))
	}
	end = min(end, s.pages)
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		if !t.tracking {
			return 0, 0, fmt.Errorf("pick pages of slot %d: %w", slot, errNotTracking)
		}
		next := s.toSend.NextSet(from&^(mempage.WordBits-1), end)
		if next >= end {
			return end, 0, nil
		}
		word := next / mempage.WordBits
		last := min(word+max/mempage.WordBits, mempage.Words(end))
		for s.toSend.Bitmap[last-1] == 0 {
			last--
		}
		first = word * mempage.WordBits
		n = min(last*mempage.WordBits, end) - first
		if t.uncleared(s, first, n) {
			// mu is free during the CLEAR: what is to be sent may change.
			if err := t.arm(slot, first, n); err != nil {
				return 0, 0, err
			}
			continue
		}
		clear(picked[copy(picked, s.toSend.Bitmap[word:last]):])
		clear(s.toSend.Bitmap[word:last])
		taken := mempage.Bitmap(picked).Count()
		s.remaining -= taken
		t.remaining -= taken
		return first, n, nil
	}
}

// PutBack puts pages that were picked, and are not read, back into toSend. first is what
// Pick returned. They stay armed.
func (t *tracker) PutBack(slot int, first uint64, picked []uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.forgotten {
		return
	}
	s := &t.slots[slot]
	for i, word := range picked {
		if word == 0 {
			continue
		}
		w := first/mempage.WordBits + uint64(i)
		added := uint64(bits.OnesCount64(word &^ s.toSend.Bitmap[w]))
		s.toSend.OrWord(w, word)
		s.remaining += added
		t.remaining += added
	}
}

// Arm arms the chunks that [first, first+n) touches, ahead of the Pick of their pages,
// which then does not wait for it.
func (t *tracker) Arm(slot int, first, n uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.arm(slot, first, n)
}

// Armed reports whether no chunk that [first, first+n) touches is left to be cleared.
func (t *tracker) Armed(slot int, first, n uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.uncleared(&t.slots[slot], first, n)
}

// NextToSend returns the first page of the slot in [from, end) that is to be sent, or
// end.
func (t *tracker) NextToSend(slot int, from, end uint64) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.slots[slot].toSend.NextSet(from, end)
}

// uncleared reports whether a chunk that [first, first+n) touches has bits that were
// fetched and not cleared, or are being cleared. It needs mu.
func (t *tracker) uncleared(s *slotBits, first, n uint64) bool {
	end := (first+n-1)>>t.shift + 1
	return s.uncleared.NextSet(first>>t.shift, end) < end
}

// maxClear is how many pages one CLEAR covers if a chunk has fewer: KVM keeps the
// guest's page faults waiting meanwhile.
const maxClear = uint64(1 << 18)

// arm clears, in KVM's log, the bits that were fetched in the chunks that [first,
// first+n) touches, and no others: a bit that was set after the fetch is a write that
// a later fetch must report (R2). Adjacent chunks of up to 1 GiB take one CLEAR. After
// an error the record of the chunks that were not cleared is as before.
//
// It needs mu, and lets go of it during the CLEAR: a chunk counts as not cleared until
// that has returned, and no fetch adds to it. A chunk that is cleared when arm returns
// need not be so for long, since a fetch may have come.
func (t *tracker) arm(slot int, first, n uint64) error {
	s := &t.slots[slot]
	chunk, end := first>>t.shift, (first+n-1)>>t.shift+1
	for {
		chunk = s.uncleared.NextSet(chunk, end)
		if chunk >= end {
			return nil
		}
		if s.clearing {
			t.cleared.Wait()
			continue
		}
		next := s.uncleared.NextClear(chunk, min(end, chunk+max(1, maxClear>>t.shift)))
		lo, hi := chunk<<t.shift, min(next<<t.shift, s.pages)
		fetched := s.fetched[lo/mempage.WordBits : mempage.Words(hi)]
		s.clearing = true
		t.mu.Unlock()
		err := t.log.ClearDirtyLog(slot, lo, hi-lo, fetched)
		t.mu.Lock()
		s.clearing = false
		t.cleared.Broadcast()
		if err != nil {
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
