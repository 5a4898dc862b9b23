// Package simtest is a simulated machine for tests of the migration engine: guest memory
// with holes, a dirty log that behaves like KVM's, devices that write memory without KVM,
// vCPUs that write while the engine reads, and the pause and resume around a handoff.
//
// [Memory] alone is enough to test the dirty tracker, step by step and in any order. A
// [Machine] adds what package migrate needs of a source and of a target, so that the whole
// engine runs. Machines share a [World], which checks that only one of them runs, and
// compares the memory of both sides at the handoff. Every write is recorded: a test that
// finds a wrong page can say which write was lost, and how.
package simtest

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"golang.org/x/sys/unix"
)

// Layout describes a guest memory and the dirty log it has.
type Layout struct {
	Slots []migrate.Slot
	// ManualProtect is KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: a GET clears nothing.
	ManualProtect bool
	// InitiallySet is KVM_DIRTY_LOG_INITIALLY_SET: the log starts with every
	// page reported and none armed. It needs ManualProtect.
	InitiallySet bool
	// HolesUnknown makes Populated report every page, as for hugetlb.
	HolesUnknown bool
}

// Memory is simulated guest memory with its dirty log. It implements
// [migrate.RAM] and [migrate.DirtyLog]. The memory is mapped outside Go's heap: vCPUs
// write it while the engine reads it, as real ones do, and the race detector does not see
// it.
//
// Methods may be called from several goroutines. A write to a page that does not exist
// panics.
type Memory struct {
	// Hooks is set before the memory is used by several goroutines.
	Hooks Hooks

	layout  Layout
	slots   []*slot
	clock   clock
	missing atomic.Pointer[missing] // nil: all of it is here
}

// Hooks are called during what the simulated kernel does. A nil hook is not called. No
// lock is held: a hook may write guest memory.
type Hooks struct {
	// Window is called during a CLEAR, or a GET that clears: the bits of pages [first,
	// first+n) are clear, and the pages are not armed yet. A write to one of them is
	// not recorded, like that of a vCPU through a stale TLB entry.
	Window func(slot int, first, n uint64)
	// FailFetch makes FetchDirtyLog fail. Without manual protection the bits are lost,
	// as if KVM could not copy them out.
	FailFetch func(slot int) error
	// FailClear makes ClearDirtyLog fail before it has cleared anything.
	FailClear func(slot int, first, n uint64) error
	// FailFetchVMM makes FetchVMMDirty fail, and its bits are lost.
	FailFetchVMM func(slot int) error
	// FailStart and FailStop make StartDirtyLog and StopDirtyLog fail.
	FailStart, FailStop func() error
}

// slot is one memory slot.
type slot struct {
	migrate.Slot
	data []byte // mapped

	// mu guards the fields below and the landing of every write.
	mu      sync.Mutex
	logging bool
	pages   []page
	faults  uint64
}

// page is what the simulated kernel and VMM record of one page.
type page struct {
	dirty     bool // in KVM's log
	armed     bool // the next guest write faults, which sets dirty
	vmm       bool // in the VMM's log
	populated bool
	given     bool // the guest has given the content up, and not written since
	history   *history
}

// NewMemory makes memory that is all holes. The caller closes it.
func NewMemory(l Layout) (*Memory, error) {
	if l.InitiallySet && !l.ManualProtect {
		return nil, fmt.Errorf("simulate memory: the log is initially set only with manual protection")
	}
	m := &Memory{layout: l}
	for i, s := range l.Slots {
		data, err := unix.Mmap(-1, 0, int(s.Pages*mempage.Size), unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
		if err != nil {
			m.Close()
			return nil, fmt.Errorf("simulate memory: map slot %d of %d pages: %w", i, s.Pages, err)
		}
		m.slots = append(m.slots, &slot{Slot: s, data: data, pages: make([]page, s.Pages)})
	}
	return m, nil
}

// Close unmaps the memory. Nothing may use it afterwards.
func (m *Memory) Close() error {
	var err error
	for _, s := range m.slots {
		if e := unix.Munmap(s.data); e != nil && err == nil {
			err = fmt.Errorf("unmap simulated memory: %w", e)
		}
	}
	m.slots = nil
	return err
}

// Slots implements [migrate.RAM].
func (m *Memory) Slots() []migrate.Slot { return m.layout.Slots }

// Bytes implements [migrate.RAM].
func (m *Memory) Bytes(slot int, first, n uint64) []byte {
	return m.slots[slot].data[first*mempage.Size : (first+n)*mempage.Size : (first+n)*mempage.Size]
}

// Populated implements [migrate.RAM]. A page also counts as populated if it has content
// that was written through Bytes.
func (m *Memory) Populated(slot int, first, n uint64, bitmap []uint64) error {
	s := m.slots[slot]
	clear(bitmap[:(n+63)/64])
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range n {
		if m.layout.HolesUnknown || s.pages[first+i].populated || !allZero(m.Bytes(slot, first+i, 1)) {
			bitmap[i/64] |= 1 << (i % 64)
		}
	}
	return nil
}

// NextPopulated implements [migrate.HoleFinder].
func (m *Memory) NextPopulated(slot int, first, n uint64) (page uint64, err error) {
	var populated [1]uint64
	for page = first; page < first+n; page++ {
		if err := m.Populated(slot, page, 1, populated[:]); err != nil || populated[0] != 0 {
			return page, err
		}
	}
	return page, nil
}

// Zero implements [migrate.RAM]: the pages become holes. Unlike [Memory.Punch] it marks
// no log.
func (m *Memory) Zero(slot int, first, n uint64) error {
	s := m.slots[slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	s.zero(first, n)
	return nil
}

// zero needs mu.
func (s *slot) zero(first, n uint64) {
	clear(s.data[first*mempage.Size : (first+n)*mempage.Size])
	for i := first; i < first+n; i++ {
		s.pages[i].populated = false
	}
}

func allZero(p []byte) bool {
	for len(p) >= 8 {
		if binary.LittleEndian.Uint64(p) != 0 {
			return false
		}
		p = p[8:]
	}
	return true
}

// Prefault implements [migrate.Target].
func (m *Memory) Prefault(slot int, first, n uint64) error {
	s := m.slots[slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := first; i < first+n; i++ {
		s.pages[i].populated = true
	}
	return nil
}

// Armed reports whether the next guest write to the page faults and is recorded by KVM,
// and whether KVM's log has the page now.
func (m *Memory) Armed(slot int, page uint64) (armed, reported bool) {
	s := m.slots[slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pages[page].armed, s.pages[page].dirty
}

// Faults is the number of guest writes so far that faulted because their page
// was armed: what dirty tracking costs the guest.
func (m *Memory) Faults() uint64 {
	var n uint64
	for _, s := range m.slots {
		s.mu.Lock()
		n += s.faults
		s.mu.Unlock()
	}
	return n
}
