package simtest

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
)

// missing is what a memory lacks: a simulated userfaultfd. Whoever writes a page that is
// missing waits until it has landed, as a vCPU does in the kernel.
type missing struct {
	memory *Memory
	want   func(slot int, first, n uint64)
	check  func(slot int, page uint64, content []byte) // what lands, before it does

	mu      sync.Mutex // guards the fields below; taken after a slot's
	absent  []mempage.Bitmap
	asked   []mempage.Bitmap
	left    uint64
	twice   uint64 // pages that came when they had landed, or were not missing
	changed chan struct{}
	gone    chan struct{}
	over    bool
}

var _ migrate.Missing = (*missing)(nil)

// Miss makes pages missing. Their content is replaced: nobody may see it.
func (m *Memory) Miss(bits [][]uint64, want func(slot int, first, n uint64)) (migrate.Missing, error) {
	x := &missing{memory: m, want: want, changed: make(chan struct{}), gone: make(chan struct{})}
	if err := m.Drop(0, bits[0]); err != nil {
		return nil, err
	}
	for i, b := range bits {
		if err := m.Drop(i, b); err != nil {
			return nil, err
		}
		x.absent, x.asked = append(x.absent, slices.Clone(b)), append(x.asked, mempage.NewBitmap(m.slots[i].Pages))
		x.left += mempage.Bitmap(b).Count()
	}
	if x.left == 0 {
		x.over = true
		close(x.gone)
	}
	x.check = func(int, uint64, []byte) {}
	m.missing.Store(x)
	return x, nil
}

// Drop forgets the content of pages.
func (m *Memory) Drop(slot int, pages []uint64) error {
	s := m.slots[slot]
	for page := range s.Pages {
		if mempage.Bitmap(pages).Get(page) {
			if err := m.Zero(slot, page, 1); err != nil {
				return err
			}
		}
	}
	return nil
}

// Fetch returns when a page is there, or false when quit is closed first.
func (m *Memory) Fetch(slot int, page uint64, quit <-chan struct{}) bool {
	x := m.missing.Load()
	if x == nil {
		return true
	}
	for {
		x.mu.Lock()
		absent, asked, changed, over := x.absent[slot].Get(page), x.asked[slot].Get(page), x.changed, x.over
		x.asked[slot].Set(page)
		x.mu.Unlock()
		if !absent {
			return true
		}
		if over {
			return false
		}
		if !asked {
			x.want(slot, page, 1)
		}
		select {
		case <-changed:
		case <-quit:
			return false
		}
	}
}

// Absent reports whether a page is missing.
func (m *Memory) Absent(slot int, page uint64) bool {
	x := m.missing.Load()
	if x == nil {
		return false
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.absent[slot].Get(page)
}

// Twice is how many pages came that had landed, or were not missing.
func (m *Memory) Twice() uint64 {
	x := m.missing.Load()
	if x == nil {
		return 0
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.twice
}

// came notes that a page is missing no more. It reports whether it was.
func (x *missing) came(slot int, page uint64) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.absent[slot].Get(page) {
		x.twice++
		return false
	}
	x.absent[slot].ClearRange(page, 1)
	x.left--
	close(x.changed)
	x.changed = make(chan struct{})
	if x.left == 0 && !x.over {
		x.over = true
		close(x.gone)
	}
	return true
}

// Land implements [migrate.Missing].
func (x *missing) Land(slot int, first, n uint64, pages []uint64, content []byte) error {
	s := x.memory.slots[slot]
	for i := range n {
		if pages[i/64]>>(i%64)&1 == 0 {
			continue
		}
		page := first + i
		s.mu.Lock()
		x.mu.Lock()
		absent, over := x.absent[slot].Get(page), x.over
		x.mu.Unlock()
		if over && absent {
			s.mu.Unlock()
			return errors.New("the rest of a simulated memory was given up")
		}
		if absent {
			data := make([]byte, mempage.Size)
			if content != nil {
				data = content[i*mempage.Size : (i+1)*mempage.Size]
			}
			x.check(slot, page, data)
			copy(s.data[page*mempage.Size:], data)
			s.pages[page].populated = content != nil
		}
		x.came(slot, page)
		s.mu.Unlock()
	}
	return nil
}

// Lacks implements [migrate.Missing].
func (x *missing) Lacks(slot int, words []uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	copy(words, x.absent[slot])
}

// Left implements [migrate.Missing].
func (x *missing) Left() uint64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.left
}

// Gone implements [migrate.Missing].
func (x *missing) Gone() <-chan struct{} { return x.gone }

// Anew implements [migrate.Missing].
func (x *missing) Anew() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i := range x.asked {
		clear(x.asked[i])
	}
	close(x.changed)
	x.changed = make(chan struct{})
}

// Stop implements [migrate.Missing].
func (x *missing) Stop() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.over {
		x.over = true
		close(x.gone)
		close(x.changed)
		x.changed = make(chan struct{})
	}
	return nil
}

// Stalls implements [migrate.Missing].
func (x *missing) Stalls() migrate.Stalls {
	x.mu.Lock()
	defer x.mu.Unlock()
	return migrate.Stalls{Left: x.left}
}

var _ migrate.Latecomer = (*Machine)(nil)

// ErrRefused is for a step that fails.
var ErrRefused = errors.New("refused by a test")

// CheckMissing implements [migrate.Latecomer].
func (m *Machine) CheckMissing() error { return call(m.Steps.Missing) }

// Miss implements [migrate.Latecomer]. What lands once the guest is here must be what the
// source has, where it stands still.
func (m *Machine) Miss(bits [][]uint64, want func(slot int, first, n uint64)) (migrate.Missing, error) {
	x, err := m.Memory.Miss(bits, want)
	if err != nil {
		return nil, err
	}
	source := m.world.Holder()
	x.(*missing).check = func(slot int, page uint64, content []byte) {
		if m.world.Holder() == m && !source.Given(slot, page) && string(source.Bytes(slot, page, 1)) != string(content) {
			m.world.wrong(fmt.Errorf("slot %d page %#x: what has landed is not what the source has", slot, page))
		}
	}
	return x, nil
}

func (w *World) wrong(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.wrongs) < 100 {
		w.wrongs = append(w.wrongs, err)
	}
}
