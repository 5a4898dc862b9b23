package memory

import (
	"math/bits"
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

// A group is what one bit of slot.groups stands for: words of the bitmap, and pages.
const (
	groupWords = 64
	groupPages = groupWords * mempage.WordBits
)

// mark sets the dirty bits of all pages of m.ram[off:off+n].
//
// It sets each word with a locked OR even if the bits are already set. A plain load
// that finds them set could be executed before the stores of the bytes (x86 may
// reorder a load with earlier stores). FetchDirty could then take the bits, and the
// page could be sent, before the bytes are visible.
//
// The group's bit comes after the word's: a fetch that took the group's bit before it
// was set is followed by one that takes both. It may be looked at first, since the
// locked OR orders that after all that precedes; a fetch that takes it later finds
// the word.
func (m *Memory) mark(off, n uint64) {
	if n == 0 {
		return
	}
	first, last := off>>mempage.Shift, (off+n-1)>>mempage.Shift
	for first <= last {
		index, at := m.at(first << mempage.Shift)
		s := &m.slots[index]
		page := at >> mempage.Shift
		end := min(last-first+page, s.pages()-1)
		for page <= end {
			bit := page % 64
			count := min(64-bit, end-page+1)
			mask := ^uint64(0) >> (64 - count) << bit
			atomic.OrUint64(&s.dirty[page/64], mask)
			group := page / groupPages
			if w, bit := &s.groups[group/64], uint64(1)<<(group%64); atomic.LoadUint64(w)&bit == 0 {
				atomic.OrUint64(w, bit)
			}
			page += count
			first += count
		}
	}
}

// FetchDirty takes the VMM's dirty bits of a slot: they are clear afterwards. It calls
// each for every word that has bits, in ascending order: bit i of word w is page
// 64*w+i of the slot. It costs what is set, and not what the slot has.
func (m *Memory) FetchDirty(index int, each func(w int, word uint64)) error {
	s, err := m.pageRange(index, 0, 0)
	if err != nil {
		return err
	}
	for g := range s.groups {
		// Bits that are set after a load are left for the next fetch. Only words with
		// bits need the swap, a locked instruction.
		if atomic.LoadUint64(&s.groups[g]) == 0 {
			continue
		}
		for left := atomic.SwapUint64(&s.groups[g], 0); left != 0; left &= left - 1 {
			first := (g*64 + bits.TrailingZeros64(left)) * groupWords
			for w := first; w < min(first+groupWords, len(s.dirty)); w++ {
				if atomic.LoadUint64(&s.dirty[w]) != 0 {
					each(w, atomic.SwapUint64(&s.dirty[w], 0))
				}
			}
		}
	}
	return nil
}
