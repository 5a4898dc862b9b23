package migrate

import (
	"sync"

	"github.com/govmm/govmm/mempage"
)

var _ Latecomer = (*heapTarget)(nil)

func (h *heapTarget) CheckMissing() error { return nil }

func (h *heapTarget) Drop(int, []uint64) error { return nil }

// Miss makes pages missing for which nobody waits.
func (h *heapTarget) Miss(missing [][]uint64, _ func(slot int, first, n uint64)) (Missing, error) {
	m := &toyMissing{target: h, gone: make(chan struct{})}
	for _, b := range missing {
		m.absent = append(m.absent, append(mempage.Bitmap(nil), b...))
	}
	m.check()
	return m, nil
}

type toyMissing struct {
	target *heapTarget

	mu     sync.Mutex // guards the fields below
	absent []mempage.Bitmap
	gone   chan struct{}
}

// check needs mu.
func (m *toyMissing) check() {
	if !isClosed(m.gone) && m.left() == 0 {
		close(m.gone)
	}
}

func (m *toyMissing) left() (n uint64) {
	for _, b := range m.absent {
		n += b.Count()
	}
	return n
}

func (m *toyMissing) Land(slot int, first, n uint64, pages []uint64, content []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range n {
		if pages[i/64]>>(i%64)&1 != 0 && m.absent[slot].Get(first+i) {
			m.absent[slot].ClearRange(first+i, 1)
			if content != nil {
				copy(m.target.mem[slot][(first+i)*mempage.Size:][:mempage.Size], content[i*mempage.Size:])
			}
		}
	}
	m.check()
	return nil
}

func (m *toyMissing) Lacks(slot int, words []uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(words, m.absent[slot])
}

func (m *toyMissing) Left() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.left()
}

func (m *toyMissing) Gone() <-chan struct{} { return m.gone }
func (m *toyMissing) Anew()                 {}
func (m *toyMissing) Stalls() Stalls        { return Stalls{} }

func (m *toyMissing) Stop() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range m.absent {
		clear(b)
	}
	m.check()
	return nil
}
