package memory

import (
	"fmt"
	"sync/atomic"

	"github.com/govmm/govmm/mempage"
)

// MarkDirty sets the VMM's dirty bits of the pages that [gpa, gpa+n) touches.
// It is called after the bytes have landed, and before the guest can learn of
// them: a bit that is set earlier can be fetched, and its page sent, while the
// bytes are still on their way.
func (m *Memory) MarkDirty(gpa, n uint64) error {
	off, err := m.offset(gpa, n)
	if err != nil {
		return err
	}
	m.mark(off, n)
	return nil
}

// mark sets the dirty bits of the pages that m.ram[off:off+n] touches.
//
// Each word is set by a locked OR even if its bits look set already. A plain
// load that finds them set may overtake the stores of the bytes themselves
// (x86 lets a load pass earlier stores); FetchDirty could then take the bits,
// and the page be read, before the bytes are there.
func (m *Memory) mark(off, n uint64) {
	if n == 0 {
		return
	}
	first, last := off>>mempage.Shift, (off+n-1)>>mempage.Shift
	for first <= last {
		// Slots are cut from m.ram every SlotSize bytes, and the hole starts
		// at a multiple of SlotSize: only the slot of memory's end is shorter.
		const slotPages = SlotSize >> mempage.Shift
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

// FetchDirty takes the VMM's dirty bits of a slot: they are stored in bitmap,
// which needs a word for every 64 pages of the slot, and are clear afterwards.
// Bit 0 of word 0 is the slot's first page. Words beyond the slot are cleared.
func (m *Memory) FetchDirty(index int, bitmap []uint64) error {
	s, err := m.pageRange(index, 0, 0)
	if err != nil {
		return err
	}
	if len(bitmap) < len(s.dirty) {
		return fmt.Errorf("dirty bitmap of memory slot %d: %d words given, %d needed", index, len(bitmap), len(s.dirty))
	}
	for i := range s.dirty {
		// A word seen as zero here and set right afterwards is the next
		// fetch's; the swap, a locked instruction, is for words with bits.
		if atomic.LoadUint64(&s.dirty[i]) == 0 {
			bitmap[i] = 0
			continue
		}
		bitmap[i] = atomic.SwapUint64(&s.dirty[i], 0)
	}
	clear(bitmap[len(s.dirty):])
	return nil
}
