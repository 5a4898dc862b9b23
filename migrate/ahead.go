package migrate

import (
	"runtime"
	"sync"

	"github.com/govmm/govmm/mempage"
)

// ahead populates memory of the destination that data is about to land in, on
// processors that no data connection needs. For a fresh page the kernel's clearing
// costs more than the copy of the data, and otherwise the reader of the connection
// pays for both.
//
// What comes next is predicted from what came before, as with a file that is read in
// order. While spans arrive one after another and are full of data, the memory after
// them is populated, up to a window that grows with them. A span that has more than
// an eighth of zeros, or that skips memory, closes the window. What was populated in
// vain becomes a hole again when the round ends ([ahead.reclaim]), except in blocks
// that also have data, which a huge page would fill as well.
//
// Blocks are of 2 MiB, a huge page, and are populated at most once. Data does not
// wait for its block: at worst two threads clear a page, and the kernel keeps one.
type ahead struct {
	target prefaulter
	slots  []Slot
	base   []uint64 // number of a slot's first block
	slack  uint64   // by how many blocks spans of several connections may be out of order

	mu      sync.Mutex // guards all below; not held while memory is populated
	changed sync.Cond
	taken   mempage.Bitmap // blocks that have been populated, here or by data, or are being
	vain    mempage.Bitmap // of those, blocks that were populated here and have had no data
	busy    int            // helpers that populate something
	next    uint64         // block to populate next, if it is below limit
	limit   uint64
	window  uint64 // how far limit is ahead of what has arrived
	expect  uint64 // block after the last span
	ended   bool
	helpers sync.WaitGroup
}

// prefaulter is the part of a [Target] that is populated.
type prefaulter interface {
	Slots() []Slot
	Prefault(slot int, first, n uint64) error
	Zero(slot int, first, n uint64) error
}

const (
	aheadPages = 512 // of a block
	// maxAhead is the widest window in blocks, 64 MiB: that much may be populated in
	// vain until the round ends.
	maxAhead = 32
)

// newAhead starts a helper for each spare processor. It returns nil if there is none.
func newAhead(target prefaulter, channels int) *ahead {
	spare := spareProcessors(channels)
	if spare == 0 {
		return nil
	}
	return startAhead(target, channels, spare)
}

// spareProcessors is how many processors are left when each channel has one, but at
// most two for each channel.
func spareProcessors(channels int) int {
	return max(0, min(runtime.GOMAXPROCS(0)-channels, 2*channels))
}

func startAhead(target prefaulter, channels, helpers int) *ahead {
	a := &ahead{target: target, slots: target.Slots(), slack: uint64(channels) * maxSpan / aheadPages}
	a.changed.L = &a.mu
	blocks := uint64(0)
	for _, s := range a.slots {
		a.base = append(a.base, blocks)
		blocks += (s.Pages + aheadPages - 1) / aheadPages
	}
	a.taken, a.vain = mempage.NewBitmap(blocks), mempage.NewBitmap(blocks)
	a.base = append(a.base, blocks)
	for range helpers {
		a.helpers.Go(a.help)
	}
	return a
}

// span announces a span whose data pages, of which there are pages, are about to land.
func (a *ahead) span(f header, data []uint64, pages int) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	first := a.base[f.slot] + f.first/aheadPages
	behind := a.base[f.slot] + (f.first+uint64(f.count)-1)/aheadPages + 1
	for b := first; b < behind; b++ {
		from := (b - a.base[f.slot]) * aheadPages
		lo, hi := max(from, f.first)-f.first, min(from+aheadPages, f.first+uint64(f.count))-f.first
		if mempage.Bitmap(data).NextSet(lo, hi) < hi {
			a.taken.SetRange(b, 1)
			a.vain.ClearRange(b, 1)
		}
	}
	a.predict(first, behind, uint64(pages), uint64(f.count))
}

// predict moves the window by the blocks [first, behind) of a span. It needs mu.
func (a *ahead) predict(first, behind, pages, count uint64) {
	inOrder := first <= a.expect+a.slack && a.expect <= behind+a.slack
	if inOrder {
		a.expect = max(a.expect, behind)
	} else {
		a.expect, a.window = behind, 0
	}
	if 8*pages >= 7*count {
		a.window = min(a.window+max(1, 2*pages/aheadPages), maxAhead)
	} else {
		a.window = 0
	}
	a.next = a.expect
	a.limit = min(a.expect+a.window, a.base[len(a.slots)])
	a.changed.Broadcast()
}

// help populates blocks until the end.
func (a *ahead) help() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for {
		for !a.ended && a.next >= a.limit {
			a.changed.Wait()
		}
		if a.ended {
			return
		}
		b := a.taken.NextClear(a.next, a.limit)
		a.next = b + 1
		if b >= a.limit {
			continue
		}
		a.taken.SetRange(b, 1)
		a.vain.SetRange(b, 1)
		a.busy++
		slot, first, n := a.block(b)
		a.mu.Unlock()
		err := a.target.Prefault(slot, first, n)
		a.mu.Lock()
		a.busy--
		if err != nil { // an older kernel, or no memory: then landing data fails too
			a.ended = true
		}
		a.changed.Broadcast()
	}
}

// block returns the pages of a block.
func (a *ahead) block(b uint64) (slot int, first, n uint64) {
	for b >= a.base[slot+1] {
		slot++
	}
	first = (b - a.base[slot]) * aheadPages
	return slot, first, min(aheadPages, a.slots[slot].Pages-first)
}

// forget marks all blocks as never populated. It is called after reclaim.
func (a *ahead) forget() {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.taken)
}

// reclaim ends a round: what was populated in vain becomes a hole again. It is called
// while nothing lands.
func (a *ahead) reclaim() error {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.window, a.limit, a.expect = 0, 0, 0
	for a.busy > 0 {
		a.changed.Wait()
	}
	end := a.base[len(a.slots)]
	for b := a.vain.NextSet(0, end); b < end; b = a.vain.NextSet(b+1, end) {
		slot, first, n := a.block(b)
		if err := a.target.Zero(slot, first, n); err != nil {
			return err
		}
		a.taken.ClearRange(b, 1)
	}
	clear(a.vain)
	return nil
}

// end stops the helpers and waits for them.
func (a *ahead) end() {
	if a == nil {
		return
	}
	a.mu.Lock()
	a.ended = true
	a.changed.Broadcast()
	a.mu.Unlock()
	a.helpers.Wait()
}
