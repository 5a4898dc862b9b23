package migrate

import (
	"runtime"
	"sync"

	"github.com/govmm/govmm/mempage"
)

// ahead populates memory of the destination that data is about to land in, on
// processors that no data connection needs. Where a page is fresh, the kernel's
// clearing of it costs more than the copy of what lands in it, and the one who
// reads the connection pays for both.
//
// Nobody says what will come; what came foretells it, as with a file that is
// read in order. While spans come one behind another and are full of data, the
// memory behind them is populated, up to a window that grows with them; a span
// of which more than an eighth is zeros, or that skips some memory, closes it. What
// was populated in vain is given back when the round ends (settle): holes stay
// holes, but for those of a block that has data too, which a huge page would fill
// as well.
//
// It works in blocks of 2 MiB, a huge page, each of which is populated once at
// most. Data does not wait for the block that it lands in: at worst two threads
// clear a page for it, of which the kernel keeps one.
type ahead struct {
	target prefaulter
	slots  []Slot
	base   []uint64 // number of a slot's first block
	slack  uint64   // blocks that spans of several connections may be out of order by

	mu      sync.Mutex // guards all below; not held while memory is populated
	changed sync.Cond
	taken   mempage.Bitmap // blocks that have been populated, here or by data, or are being
	vain    mempage.Bitmap // of those, blocks that were populated here and have had no data
	busy    int            // helpers that populate something
	next    uint64         // block to populate next, if
	limit   uint64         // it is below this one
	window  uint64         // how far limit is ahead of what has come
	expect  uint64         // block behind the last span
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
	// maxAhead is the widest window in blocks, 64 MiB: what is populated in vain
	// at most, until the round ends.
	maxAhead = 32
)

// newAhead starts as many helpers as there are processors to spare. It returns
// nil if there are none.
func newAhead(target prefaulter, channels int) *ahead {
	spare := spareProcessors(channels)
	if spare == 0 {
		return nil
	}
	return startAhead(target, channels, spare)
}

// spareProcessors is how many processors are left when each channel has one, and
// no more than can be of use to them.
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

// span says that the data pages of a span are about to land, pages of them.
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
	a.foretell(first, behind, uint64(pages), uint64(f.count))
}

// foretell moves the window by what a span tells.
func (a *ahead) foretell(first, behind, pages, count uint64) {
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

// forget makes all blocks such as have never been populated. It is called after
// settle, when they are.
func (a *ahead) forget() {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.taken)
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
