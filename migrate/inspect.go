package migrate

import (
	"math/bits"
	"slices"
	"sync"

	"github.com/govmm/govmm/mempage"
)

// inspection finds out what hints are worth. A page that was zero before the guest was asked
// costs nothing on the wire.
//
// It also detects a guest that fills pages with zeros before it hints them, since its
// allocator clears what it returns (Linux with init_on_alloc=1, the default of some
// distributions). For such a guest a hint is a write, and the page is sent as zero. That
// saves the content of pages that it used before, but populates pages that it never used.
//
// A sample of the hinted pages shows it: those that a fetch reported afterwards, that
// read as zero, and that were holes before the guest was asked.
type inspection struct {
	// before has the populated pages of the first 64 of each stride-th block, from before
	// the announcement, a word for each; by slot. content says whether the first populated
	// one was not zero.
	before  [][]uint64
	content []mempage.Bitmap
	stride  uint64

	mu           sync.Mutex // guards what follows
	sample       []pageRange
	next         int    // the length of the sample at which it is judged next
	blocks, full uint64 // hinted; of these, with content before
}

const (
	// inspectBlock is how far apart samples are taken, in pages: the 4 MiB that
	// Linux hints at once.
	inspectBlock = 1024
	// inspectEach and inspectMost bound the sample: pages of each block, and of all.
	// The sample is judged first when it has inspectLeast pages, and then whenever it
	// has grown fourfold.
	inspectEach  = 8
	inspectMost  = 1024
	inspectLeast = 64
	// inspectBlocks bounds the blocks that are recorded, of large memory.
	inspectBlocks = 4096
)

// begin records what is populated now.
func (x *inspection) begin(h *hinter) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.sample, x.next, x.blocks, x.full = x.sample[:0], inspectLeast, 0, 0
	var pages uint64
	for _, s := range h.slots {
		pages += s.Pages
	}
	x.stride = pages/inspectBlock/inspectBlocks + 1
	x.before, x.content = make([][]uint64, len(h.slots)), make([]mempage.Bitmap, len(h.slots))
	for slot, s := range h.slots {
		x.before[slot] = make([]uint64, (s.Pages-1)/inspectBlock/x.stride+1)
		x.content[slot] = mempage.NewBitmap(uint64(len(x.before[slot])))
		for i := range x.before[slot] {
			first := uint64(i) * x.stride * inspectBlock
			if err := h.ram.Populated(slot, first, min(mempage.WordBits, s.Pages-first), x.before[slot][i:i+1]); err != nil {
				return err
			}
			word := x.before[slot][i]
			if word == 0 {
				continue
			}
			zero, err := pageIsZero(h.ram, slot, first+uint64(bits.TrailingZeros64(word)))
			if err != nil {
				return err
			}
			if !zero {
				x.content[slot].Set(uint64(i))
			}
		}
	}
	return nil
}

// recorded returns the index in before of the block that begins at a page.
func (x *inspection) recorded(page uint64) (i uint64, ok bool) {
	block := page / inspectBlock
	return block / x.stride, block%x.stride == 0
}

// worth is the share of the pages that hints take out which had content before.
func (x *inspection) worth() float64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.blocks == 0 {
		return 1
	}
	return float64(x.full) / float64(x.blocks)
}

// note takes a sample of what was hinted, from the pages that begin recorded.
func (x *inspection) note(ranges []pageRange) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.before == nil {
		return
	}
	for _, r := range ranges {
		// The first block is the one that the range begins in.
		for at := r.first &^ (inspectBlock - 1); at < r.first+r.n; at += inspectBlock {
			i, ok := x.recorded(at)
			if !ok {
				continue
			}
			if at >= r.first {
				x.blocks++
				if x.content[r.slot].Get(i) {
					x.full++
				}
			}
			first := max(at, r.first)
			for p := first; p < min(at+mempage.WordBits, r.first+r.n, first+inspectEach) && len(x.sample) < inspectMost; p++ {
				x.sample = append(x.sample, pageRange{r.slot, p, 1})
			}
		}
	}
}

// worse reports, once the sample is large enough, that hints cost more than they save:
// most of the sample was written again and is zero, and most of that was a hole before.
// What is read here does not decide what is sent.
func (x *inspection) worse(h *hinter) (bool, error) {
	x.mu.Lock()
	ready := len(x.sample) >= x.next
	var sample []pageRange
	if ready {
		x.next *= 4
		sample = slices.Clone(x.sample)
	}
	x.mu.Unlock()
	if !ready {
		return false, nil
	}
	if err := h.tracker.Sync(); err != nil {
		return false, err
	}
	kept := make([]bool, len(sample))
	h.tracker.hintedNow(sample, func(i int) { kept[i] = true })
	var back, zero, holes int
	for i, p := range sample {
		if kept[i] {
			continue
		}
		back++
		isZero, err := pageIsZero(h.ram, p.slot, p.first)
		if err != nil {
			return false, err
		}
		if isZero {
			zero++
			if i, _ := x.recorded(p.first); x.before[p.slot][i]>>(p.first%inspectBlock)&1 == 0 {
				holes++
			}
		}
	}
	return back*4 >= len(sample)*3 && zero*10 >= back*9 && holes*2 > zero, nil
}
