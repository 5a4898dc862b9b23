package simtest

import (
	"fmt"

	"github.com/govmm/govmm/migrate"
	"golang.org/x/sys/unix"
)

var (
	_ migrate.RAM      = (*Memory)(nil)
	_ migrate.DirtyLog = (*Memory)(nil)
)

// ManualProtect implements [migrate.DirtyLog].
func (m *Memory) ManualProtect() bool { return m.layout.ManualProtect }

// StartDirtyLog implements [migrate.DirtyLog]: every page is armed, or, with
// InitiallySet, reported and not armed. It changes nothing where it is on.
func (m *Memory) StartDirtyLog() error {
	if f := m.Hooks.FailStart; f != nil {
		if err := f(); err != nil {
			return err
		}
	}
	for _, s := range m.slots {
		s.mu.Lock()
		if !s.logging {
			s.logging = true
			for i := range s.pages {
				s.pages[i].dirty = m.layout.InitiallySet
				s.pages[i].armed = !m.layout.InitiallySet
			}
		}
		s.mu.Unlock()
	}
	return nil
}

// StopDirtyLog implements [migrate.DirtyLog].
func (m *Memory) StopDirtyLog() error {
	if f := m.Hooks.FailStop; f != nil {
		if err := f(); err != nil {
			return err
		}
	}
	for _, s := range m.slots {
		s.mu.Lock()
		s.logging = false
		for i := range s.pages {
			s.pages[i].dirty = false
			s.pages[i].armed = false
		}
		s.mu.Unlock()
	}
	return nil
}

// Logging reports whether the dirty log is on.
func (m *Memory) Logging() bool {
	for _, s := range m.slots {
		s.mu.Lock()
		on := s.logging
		s.mu.Unlock()
		if on {
			return true
		}
	}
	return false
}

// FetchDirtyLog implements [migrate.DirtyLog]. Like KVM_GET_DIRTY_LOG it copies the bits
// under manual protection; without, it takes them and arms their pages.
func (m *Memory) FetchDirtyLog(slot int, bitmap []uint64) error {
	s, err := m.tracked("KVM_GET_DIRTY_LOG", slot)
	if err != nil {
		return err
	}
	if need := (s.Pages + 63) / 64; uint64(len(bitmap)) != need {
		return fmt.Errorf("KVM_GET_DIRTY_LOG slot %d: %d words for a slot of %d: %w", slot, len(bitmap), need, unix.EINVAL)
	}
	clear(bitmap)
	s.mu.Lock()
	for i := range s.pages {
		if s.pages[i].dirty {
			bitmap[i/64] |= 1 << (i % 64)
			s.pages[i].dirty = m.layout.ManualProtect
		}
	}
	s.mu.Unlock()
	if !m.layout.ManualProtect {
		m.rearm(slot, 0, bitmap)
	}
	if f := m.Hooks.FailFetch; f != nil {
		if err := f(slot); err != nil {
			garble(bitmap)
			return err
		}
	}
	return nil
}

// ClearDirtyLog implements [migrate.DirtyLog]. Like KVM_CLEAR_DIRTY_LOG it clears the
// bits that are set both in bitmap and in the log, and arms those pages. A page whose
// bit is not set in the log stays as it is.
func (m *Memory) ClearDirtyLog(slot int, first, n uint64, bitmap []uint64) error {
	s, err := m.tracked("KVM_CLEAR_DIRTY_LOG", slot)
	if err != nil {
		return err
	}
	if !m.layout.ManualProtect || first%64 != 0 || first >= s.Pages || n == 0 || n > s.Pages-first ||
		n%64 != 0 && first+n != s.Pages || uint64(len(bitmap)) != (n+63)/64 {
		return fmt.Errorf("KVM_CLEAR_DIRTY_LOG slot %d pages [%#x,+%#x) with %d words: %w", slot, first, n, len(bitmap), unix.EINVAL)
	}
	if f := m.Hooks.FailClear; f != nil {
		if err := f(slot, first, n); err != nil {
			return err
		}
	}
	cleared := make([]uint64, len(bitmap))
	s.mu.Lock()
	for i := range n {
		if p := &s.pages[first+i]; bitmap[i/64]>>(i%64)&1 != 0 && p.dirty {
			p.dirty = false
			cleared[i/64] |= 1 << (i % 64)
		}
	}
	s.mu.Unlock()
	m.rearm(slot, first, cleared)
	return nil
}

// rearm arms the pages whose bits were cleared. Writes between the clearing and the
// arming are not recorded.
func (m *Memory) rearm(slot int, first uint64, cleared []uint64) {
	s := m.slots[slot]
	n := min(uint64(len(cleared))*64, s.Pages-first)
	if f := m.Hooks.Window; f != nil {
		f(slot, first, n)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range n {
		if s.logging && cleared[i/64]>>(i%64)&1 != 0 {
			s.pages[first+i].armed = true
		}
	}
}

// FetchVMMDirty implements [migrate.DirtyLog].
func (m *Memory) FetchVMMDirty(slot int, each func(w int, word uint64)) error {
	if slot < 0 || slot >= len(m.slots) {
		return fmt.Errorf("fetch the VMM's dirty log: there is no slot %d", slot)
	}
	s := m.slots[slot]
	bitmap := make([]uint64, (s.Pages+63)/64)
	s.mu.Lock()
	for i := range s.pages {
		if s.pages[i].vmm {
			bitmap[i/64] |= 1 << (i % 64)
			s.pages[i].vmm = false
		}
	}
	s.mu.Unlock()
	if f := m.Hooks.FailFetchVMM; f != nil {
		if err := f(slot); err != nil {
			return err
		}
	}
	for w, word := range bitmap {
		if word != 0 {
			each(w, word)
		}
	}
	return nil
}

// garble makes the result of a failed fetch wrong, for callers that use it.
func garble(bitmap []uint64) {
	for i := range bitmap {
		bitmap[i] = ^uint64(0)
	}
}

// tracked returns a slot whose dirty log is on; KVM answers ENOENT for others.
func (m *Memory) tracked(what string, number int) (*slot, error) {
	if number < 0 || number >= len(m.slots) {
		return nil, fmt.Errorf("%s slot %d of %d: %w", what, number, len(m.slots), unix.EINVAL)
	}
	s := m.slots[number]
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.logging {
		return nil, fmt.Errorf("%s slot %d: %w", what, number, unix.ENOENT)
	}
	return s, nil
}
