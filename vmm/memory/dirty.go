package memory

import (
	"fmt"
	"sync/atomic"

	"github.com/govmm/govmm/mempage"
)

// MarkDirty sets the VMM's dirty bits of all pages of [gpa, gpa+n). Call it after the
// bytes are written, and before the guest can know of them: a migration could fetch
// an earlier bit, and send the page, before the bytes are written.
func (m *Memory) MarkDirty(gpa, n uint64) error {
	off, err := m.offset(gpa, n)
	if err != nil {
		return err
	}
	m.mark(off, n)
	return nil
}

// mark sets the dirty bits of all pages of m.ram[off:off+n].
//
// It sets each word with a locked OR even if the bits are already set. A plain load
// that finds them set could be executed before the stores of the bytes (x86 may
// reorder a load with earlier stores). FetchDirty could then take the bits, and the
// page could be sent, before the bytes are visible.
func (m *Memory) mark(off, n uint64) {
	if n == 0 {
		return
	}
	first, last := off>>mempage.Shift, (off+n-1)>>mempage.Shift
	for first <= last {
		// Every slot except the last has slotSize bytes of m.ram, because the
		// hole starts at a multiple of slotSize.
		const slotPages = slotSize >> mempage.Shift
		s := &m.slots[first/slotPages]
		page := first % slotPages
		end := min(last-first+page, s.pages()-1)
		for page <= end {
			bit := page % 64
			count := min(64-bit, end-page+1)
			mask := ^uint64(0) >> (64 - count) << bit
			atomic.OrUint64(&s.dirty[page/64], mask)
			page += count
			first += count
		}
	}
}

// FetchDirty moves the VMM's dirty bits of a slot into bitmap, which needs a word for
// every 64 pages of the slot; the slot's bits are clear afterwards. Bit 0 of word 0
// is the slot's first page. FetchDirty clears words beyond the slot.
func (m *Memory) FetchDirty(index int, bitmap []uint64) error {
	s, err := m.pageRange(index, 0, 0)
	if err != nil {
		return err
	}
	if len(bitmap) < len(s.dirty) {
		return fmt.Errorf("dirty bitmap of memory slot %d: expected %d words or more, got %d", index, len(s.dirty), len(bitmap))
	}
	for i := range s.dirty {
		// Bits that are set after this load are left for the next fetch. Only
		// words with bits need the swap, a locked instruction.
		if atomic.LoadUint64(&s.dirty[i]) == 0 {
			bitmap[i] = 0
			continue
		}
		bitmap[i] = atomic.SwapUint64(&s.dirty[i], 0)
	}
	clear(bitmap[len(s.dirty):])
	return nil
}
