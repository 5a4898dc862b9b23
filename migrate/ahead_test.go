package migrate

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/govmm/govmm/mempage"
	"pgregory.net/rapid"
)

// blocksTarget is a destination's memory that records only which blocks are populated,
// and by whom.
type blocksTarget struct {
	heapTarget // nothing of it is used
	slots      []Slot
	fail       error // of Prefault

	mu    sync.Mutex
	ahead map[[2]uint64]bool // slot and block that Prefault has populated
	data  map[[2]uint64]bool // that data has landed in, or is about to
	wrong error              // the first
}

func newBlocksTarget(pages ...uint64) *blocksTarget {
	b := &blocksTarget{ahead: map[[2]uint64]bool{}, data: map[[2]uint64]bool{}}
	for i, n := range pages {
		b.slots = append(b.slots, Slot{GPA: uint64(i) << 40, Pages: n})
	}
	return b
}

func (b *blocksTarget) Slots() []Slot { return b.slots }

func (b *blocksTarget) check(ok bool, format string, args ...any) {
	if !ok && b.wrong == nil {
		b.wrong = fmt.Errorf(format, args...)
	}
}

func (b *blocksTarget) Prefault(slot int, first, n uint64) error {
	at := [2]uint64{uint64(slot), first / aheadPages}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.check(first%aheadPages == 0 && n == min(aheadPages, b.slots[slot].Pages-first), "populates [%d,+%d) of slot %d", first, n, slot)
	b.check(!b.ahead[at], "populates block %v, which is there", at)
	if b.fail != nil {
		return b.fail
	}
	b.ahead[at] = true
	return nil
}

func (b *blocksTarget) Zero(slot int, first, n uint64) error {
	at := [2]uint64{uint64(slot), first / aheadPages}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.check(b.ahead[at] && !b.data[at], "zeroes block %v", at)
	b.check(first%aheadPages == 0 && n <= aheadPages, "zeroes [%d,+%d)", first, n)
	delete(b.ahead, at)
	return nil
}

// land does what a channel does with a span whose data pages are those of bits.
func (b *blocksTarget) land(a *ahead, slot int, first uint64, data []bool) {
	f := header{typ: framePages, slot: uint16(slot), first: first, count: uint32(len(data))}
	words := mempage.NewBitmap(uint64(len(data)))
	blocks := map[[2]uint64]bool{}
	for i, d := range data {
		if d {
			words.Set(uint64(i))
			blocks[[2]uint64{uint64(slot), (first + uint64(i)) / aheadPages}] = true
		}
	}
	a.span(f, words, int(words.Count()))
	b.mu.Lock()
	defer b.mu.Unlock()
	for at := range blocks {
		b.data[at] = true
	}
}

func full(n int) []bool {
	data := make([]bool, n)
	for i := range data {
		data[i] = true
	}
	return data
}

// idle waits until everything in the window has been populated.
func (a *ahead) idle() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for !a.ended && a.taken.NextClear(a.next, a.limit) < a.limit || a.busy > 0 {
		a.changed.Wait()
	}
}

func (b *blocksTarget) populated(t *testing.T) int {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.wrong != nil {
		t.Fatal(b.wrong)
	}
	return len(b.ahead)
}

// Memory after full spans is populated, across slots, by a window that grows.
func TestAheadOfFullSpans(t *testing.T) {
	b := newBlocksTarget(3*aheadPages+7, 100*aheadPages)
	a := startAhead(b, 1, 1)
	defer a.end()
	// The last two blocks of slot 0 and two of slot 1, then eight after those two.
	for i, want := range []int{4, 4 + 8} {
		b.land(a, i, 0, full(2*aheadPages))
		a.idle()
		if n := b.populated(t); n != want {
			t.Errorf("after %d spans %d blocks were populated, want %d", i+1, n, want)
		}
	}
	for first := uint64(2); first < 90; first += 2 {
		b.land(a, 1, first*aheadPages, full(2*aheadPages))
		a.idle()
	}
	if err := a.reclaim(); err != nil {
		t.Fatal(err)
	}
	// All of slot 1 that has data, and nothing else.
	if n := b.populated(t); n != 90 {
		t.Errorf("%d blocks are populated, want 90", n)
	}
}

// After zeros or a gap nothing more is populated, and what was populated becomes a hole
// again.
func TestAheadEndsWithTheData(t *testing.T) {
	for name, next := range map[string]func(b *blocksTarget, a *ahead){
		"zeros":   func(b *blocksTarget, a *ahead) { b.land(a, 0, 8*aheadPages, make([]bool, 2*aheadPages)) },
		"nothing": func(*blocksTarget, *ahead) {},
		"a gap":   func(b *blocksTarget, a *ahead) { b.land(a, 0, 50*aheadPages, full(1)) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBlocksTarget(100 * aheadPages)
			a := startAhead(b, 1, 2)
			defer a.end()
			for first := uint64(0); first < 8; first += 2 {
				b.land(a, 0, first*aheadPages, full(2*aheadPages))
			}
			a.idle()
			next(b, a)
			a.idle()
			if n := b.populated(t); n < 10 {
				t.Errorf("%d blocks were populated", n)
			}
			if err := a.reclaim(); err != nil {
				t.Fatal(err)
			}
			if n := b.populated(t); n > 6 {
				t.Errorf("%d blocks are populated still, 8 have data", n)
			}
		})
	}
}

// For spans in any order: no block is populated after data has landed in it, none twice,
// and at the end of a round no block without data is populated.
func TestAheadProperty(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		b := newBlocksTarget(rapid.Uint64Range(1, 5*aheadPages).Draw(rt, "slot 0"), rapid.Uint64Range(1, 64*aheadPages).Draw(rt, "slot 1"))
		channels := rapid.IntRange(1, 3).Draw(rt, "channels")
		a := startAhead(b, channels, rapid.IntRange(1, 3).Draw(rt, "helpers"))
		defer a.end()
		for range rapid.IntRange(1, 3).Draw(rt, "rounds") {
			spans := make(chan func(), 1)
			var all sync.WaitGroup
			for range channels {
				all.Go(func() {
					for land := range spans {
						land()
					}
				})
			}
			for slot, s := range b.slots {
				for first := uint64(0); first < s.Pages; {
					n := min(rapid.Uint64Range(1, maxSpan).Draw(rt, "span"), s.Pages-first)
					data := make([]bool, n)
					switch rapid.IntRange(0, 4).Draw(rt, "kind") {
					case 0: // zeros
					case 1:
						for i := range data {
							data[i] = i%7 == 0
						}
					case 2: // a gap, in place of a span
						first += n
						continue
					default:
						data = full(int(n))
					}
					at := first
					spans <- func() { b.land(a, slot, at, data) }
					first += n
				}
			}
			close(spans)
			all.Wait()
			if err := a.reclaim(); err != nil {
				rt.Fatal(err)
			}
			if b.wrong != nil {
				rt.Fatal(b.wrong)
			}
			for at := range b.ahead {
				if !b.data[at] {
					rt.Fatalf("block %v is populated and has no data", at)
				}
			}
		}
	})
}

// A machine that cannot populate memory gets its data nevertheless.
func TestAheadOfNothing(t *testing.T) {
	b := newBlocksTarget(100 * aheadPages)
	b.fail = errors.New("no MADV_POPULATE_WRITE")
	a := startAhead(b, 1, 2)
	for first := uint64(0); first < 100; first += 2 {
		b.land(a, 0, first*aheadPages, full(2*aheadPages))
	}
	a.end()
	if n := b.populated(t); n != 0 {
		t.Errorf("%d blocks were populated", n)
	}
}
