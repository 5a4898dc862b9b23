package migrate

import (
	"runtime"
	"sync"
)

// ahead populates memory of the destination that data is about to land in, on
// processors that no data connection needs. Where a page is fresh, the kernel's
// clearing of it costs more than the copy of what lands in it, and the one who
// reads the connection pays for both.
//
// Nobody says what will come; what came foretells it, as with a file that is
// read in order. While spans come one behind another and are full of data, the
// memory behind them is populated, up to a window that grows with them; a span
// that is mostly zeros, or that skips some memory, closes it. What was populated
// in vain is given back when the round ends (settle): holes stay holes.
//
// It works in blocks of 2 MiB, a huge page. Each is populated once at most,
// and by one at a time: two that fault the same huge page in would both clear one.
type ahead struct {
	target Target
	slots  []Slot
	base   []uint64 // number of a slot's first block
	slack  uint64   // blocks that spans of several connections may be out of order by

	mu      sync.Mutex // guards all below; not held while memory is populated
	changed sync.Cond
	taken   bitmap   // blocks that have been populated, here or by data, or are being
	vain    bitmap   // of those, blocks that were populated here and have had no data
	busy    []uint64 // by populating goroutine: its block, from 1; 0: none
	next    uint64   // block to populate next, if
	limit   uint64   // it is below this one
	window  uint64   // how far limit is ahead of what has come
	expect  uint64   // block behind the last span
	ended   bool
	helpers sync.WaitGroup
}

const (
	aheadPages = 512 // of a block
	// maxAhead is the widest window in blocks, 64 MiB: what is populated in vain
	// at most, until the round ends.
	maxAhead = 32
)

// newAhead starts as many helpers as there are processors to spare, and no more
// than can be of use. It returns nil if there are none.
func newAhead(target Target, channels int) *ahead {
	spare := min(runtime.GOMAXPROCS(0)-channels, 2*channels)
	if spare <= 0 || channels == 0 {
		return nil
	}
	return startAhead(target, channels, spare)
}

func startAhead(target Target, channels, helpers int) *ahead {
	a := &ahead{target: target, slots: target.Slots(), busy: make([]uint64, helpers), slack: uint64(channels) * maxSpan / aheadPages}
	a.changed.L = &a.mu
	blocks := uint64(0)
	for _, s := range a.slots {
		a.base = append(a.base, blocks)
		blocks += (s.Pages + aheadPages - 1) / aheadPages
	}
	a.taken, a.vain = newBitmap(blocks), newBitmap(blocks)
	a.base = append(a.base, blocks)
	for i := range helpers {
		a.helpers.Go(func() { a.help(i) })
	}
	return a
}

// span says that the data pages of a span are about to land, pages of them. It
// returns when nobody populates the memory that they land in.
func (a *ahead) span(f header, data []uint64, pages int) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	first := a.base[f.slot] + f.first/aheadPages
	behind := a.base[f.slot] + (f.first+uint64(f.count)-1)/aheadPages + 1
	mine := func(block uint64) bool { // has data pages of the span
		from := (block - a.base[f.slot]) * aheadPages
		lo, hi := max(from, f.first)-f.first, min(from+aheadPages, f.first+uint64(f.count))-f.first
		return bitmap(data).nextSet(lo, hi) < hi
	}
	for b := first; b < behind; b++ {
		if mine(b) {
			a.taken.setRange(b, 1)
			a.vain.clearRange(b, 1)
		}
	}
	a.foretell(first, behind, uint64(pages), uint64(f.count))
	for a.populating(first, behind, mine) {
		a.changed.Wait()
	}
}

// foretell moves the window by what a span tells.
func (a *ahead) foretell(first, behind, pages, count uint64) {
	inOrder := first <= a.expect+a.slack && a.expect <= behind+a.slack
	if inOrder {
		a.expect = max(a.expect, behind)
	} else {
		a.expect, a.window = behind, 0
	}
	if 2*pages >= count {
		a.window = min(a.window+max(1, 2*pages/aheadPages), maxAhead)
	} else {
		a.window = 0
	}
	a.next = a.expect
	a.limit = min(a.expect+a.window, a.base[len(a.slots)])
	a.changed.Broadcast()
}

// populating says that a helper is at work on one of the blocks.
func (a *ahead) populating(first, behind uint64, mine func(uint64) bool) bool {
	for _, b := range a.busy {
		if b > first && b <= behind && mine(b-1) {
			return true
		}
	}
	return false
}

// help populates blocks until the end.
func (a *ahead) help(helper int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for {
		for !a.ended && a.next >= a.limit {
			a.changed.Wait()
		}
		if a.ended {
			return
		}
		b := a.taken.nextClear(a.next, a.limit)
		a.next = b + 1
		if b >= a.limit {
			continue
		}
		a.taken.setRange(b, 1)
		a.vain.setRange(b, 1)
		a.busy[helper] = b + 1
		slot, first, n := a.block(b)
		a.mu.Unlock()
		err := a.target.Prefault(slot, first, n)
		a.mu.Lock()
		a.busy[helper] = 0
		if err != nil { // an older kernel, or no memory: landing data will tell
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

// settle ends a round: what was populated in vain becomes a hole again. It is
// called while nothing lands.
func (a *ahead) settle() error {
	if a == nil {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.window, a.limit, a.expect = 0, 0, 0
	for a.populating(0, a.base[len(a.slots)], func(uint64) bool { return true }) {
		a.changed.Wait()
	}
	end := a.base[len(a.slots)]
	for b := a.vain.nextSet(0, end); b < end; b = a.vain.nextSet(b+1, end) {
		slot, first, n := a.block(b)
		if err := a.target.Zero(slot, first, n); err != nil {
			return err
		}
		a.taken.clearRange(b, 1)
	}
	clear(a.vain)
	return nil
}

// end returns when nothing is populated any more.
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
