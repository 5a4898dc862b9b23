package migrate

import (
	"slices"
	"sync"

	"github.com/govmm/govmm/mempage"
)

// inspection detects a guest that fills pages with zeros before it hints them, since its
// allocator clears what it returns (Linux with init_on_alloc=1, the default of some
// distributions). For such a guest a hint is a write, and the page is sent as zero. That
// saves the content of pages that it used before, but populates pages that it never used.
//
// A sample of the hinted pages shows it: those that a fetch reported afterwards, that
// read as zero, and that were holes before the guest was asked.
type inspection struct {
	// before has the populated pages of the first 64 of each block, from before
	// the announcement, a word for each block; by slot.
	before [][]uint64

	mu     sync.Mutex // guards what follows
	sample []pageRange
	next   int // the length of the sample at which it is judged next
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
)

// begin records what is populated now.
func (x *inspection) begin(h *hinter) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.sample, x.next = x.sample[:0], inspectLeast
	x.before = make([][]uint64, len(h.slots))
	for slot, s := range h.slots {
		x.before[slot] = make([]uint64, (s.Pages+inspectBlock-1)/inspectBlock)
		for i := range x.before[slot] {
			first := uint64(i) * inspectBlock
			if err := h.ram.Populated(slot, first, min(mempage.WordBits, s.Pages-first), x.before[slot][i:i+1]); err != nil {
				return err
			}
		}
	}
	return nil
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
			first := max(at, r.first)
			for p := first; p < min(at+mempage.WordBits, r.first+r.n, first+inspectEach); p++ {
				if len(x.sample) == inspectMost {
					return
				}
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
		if isZero(h.ram.Bytes(p.slot, p.first, 1)) {
			zero++
			if x.before[p.slot][p.first/inspectBlock]>>(p.first%inspectBlock)&1 == 0 {
				holes++
			}
		}
	}
	return back*4 >= len(sample)*3 && zero*10 >= back*9 && holes*2 > zero, nil
}
