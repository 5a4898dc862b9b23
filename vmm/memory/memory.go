// Package memory is guest physical memory: its backing on the host, its layout in
// the guest, and the VMM's writes to it.
//
// The first 3 GiB of RAM start at guest physical address (gpa) 0. The rest starts at
// 4 GiB, so that the last GiB below 4 GiB is free for devices. RAM is divided into
// [Slot]s, each to be registered as a KVM memory slot, so that the dirty log of each
// part can be fetched separately. They have 1 GiB, or, in a guest of more than 64 GiB,
// the power of two of which about 64 make up the memory: what is done for each slot
// then costs the same at any size.
//
// KVM logs the writes of vCPUs and of the kernel, but not those of this process.
// Every write through this package therefore sets a bit in a bitmap, after the bytes
// are written; [Memory.FetchDirty] fetches the bits. A live migration needs both
// logs.
//
// docs/memory.md describes how to choose a backing.
package memory

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

const (
	// minSlotSize is the size of a slot in bytes, if no more than maxSlots of them are
	// needed. At 1 TiB a slot has 16 GiB, and the bitmap of its dirty log 512 KiB, which
	// fits a processor's cache.
	minSlotSize = 1 << 30
	maxSlots    = 64
	// HoleStart is the first of the guest physical addresses that are never RAM.
	// PCI windows, the IOAPIC and the local APICs are there.
	HoleStart = 3 << 30
	// HoleEnd is the first address above the hole.
	HoleEnd = 4 << 30
	// MinSize is the smallest size of a guest's memory in bytes.
	MinSize = 1 << 20
	// MaxSize is the largest size of a guest's memory in bytes, 16 TiB.
	MaxSize = 16 << 40

	hugePageSize = 2 << 20
)

// errNotRAM is the cause of an error for a range of guest physical addresses that is
// not inside one contiguous range of RAM.
var errNotRAM = errors.New("not guest RAM")

// Slot is a range of RAM that is contiguous in guest physical and in host virtual
// memory, to be registered as a KVM memory slot.
type Slot struct {
	GPA  uint64  // guest physical address of the first byte
	Size uint64  // length in bytes, a multiple of [mempage.Size]
	HVA  uintptr // host virtual address of the first byte
}

// slot is a Slot with its memory and dirty bits.
type slot struct {
	Slot
	ram    []byte   // the memory itself
	off    uint64   // offset of ram in Memory.ram, in bytes
	dirty  []uint64 // the VMM's writes, one bit for each page; accessed atomically
	groups []uint64 // one bit for each groupWords of dirty that may not be zero; accessed atomically
}

// pages returns the slot's length in pages.
func (s *slot) pages() uint64 { return s.Size >> mempage.Shift }

// Memory is the RAM of one guest. All methods but Close may be called from
// several goroutines, and while vCPUs run.
type Memory struct {
	backing Backing
	low     uint64 // bytes of RAM from gpa 0
	high    uint64 // bytes of RAM from gpa 4 GiB
	ram     []byte // low and high, contiguous here
	slots   []slot
	unit    uint64                  // size of each slot except the last one below the hole and the last one
	lows    uint64                  // slots below the hole
	fd      int                     // the memfd, or -1
	pagemap *pagemap                // nil if holes are found in the memfd
	missing atomic.Pointer[Missing] // nil: all of it is here
	// inherited are huge pages that a process before has populated, see Inherited; nil: none is known.
	inherited mempage.Bitmap
	extents   dataExtents // of the memfd
	mapped    *mapped     // nil unless the content comes from a file
}

// New returns guest memory of size bytes. No page is populated: the kernel allocates
// a page at the first write to it. size must be a multiple of [mempage.Size] (of 2
// MiB for [Hugetlb]) between [MinSize] and [MaxSize].
func New(size uint64, b Backing) (*Memory, error) {
	if _, err := ParseBacking(string(b)); err != nil {
		return nil, err
	}
	unit := uint64(mempage.Size)
	if b == Hugetlb {
		unit = hugePageSize
	}
	if size < MinSize || size > MaxSize {
		return nil, fmt.Errorf("guest memory of %d bytes: must be between 1 MiB and 16 TiB", size)
	}
	if size%unit != 0 {
		return nil, fmt.Errorf("guest memory of %d bytes: must be a multiple of %d KiB for backing %s", size, unit>>10, b)
	}
	return made(size, b, func(m *Memory) error { return m.open(size) })
}

// made returns memory that open has mapped.
func made(size uint64, b Backing, open func(*Memory) error) (*Memory, error) {
	m := &Memory{backing: b, low: min(size, HoleStart), unit: slotSize(size), fd: -1}
	m.high = size - m.low
	if err := open(m); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	m.cut(0, 0, m.low)
	m.lows = uint64(len(m.slots))
	m.cut(HoleEnd, m.low, m.high)
	return m, nil
}

// slotSize returns the size of the slots of a guest's memory. Both ends of a migration
// compute the same.
func slotSize(size uint64) uint64 {
	unit := uint64(minSlotSize)
	for unit*maxSlots < size {
		unit *= 2
	}
	return unit
}

// cut adds the slots of n bytes of RAM at gpa, which are at off in m.ram.
func (m *Memory) cut(gpa, off, n uint64) {
	for n > 0 {
		size := min(n, m.unit)
		ram := m.ram[off : off+size : off+size]
		m.slots = append(m.slots, slot{
			Slot:   Slot{GPA: gpa, Size: size, HVA: uintptr(unsafe.Pointer(&ram[0]))},
			ram:    ram,
			off:    off,
			dirty:  make([]uint64, mempage.Words(size>>mempage.Shift)),
			groups: make([]uint64, mempage.Words((size>>mempage.Shift+groupPages-1)/groupPages)),
		})
		gpa, off, n = gpa+size, off+size, n-size
	}
}

// Close frees the memory. Nothing may use it any more: no vCPU runs, KVM's slots are
// deleted, and no slice of it is in use.
func (m *Memory) Close() error {
	m.mapped.end()
	var errs []error
	if x := m.missing.Load(); x != nil {
		errs = append(errs, x.Stop())
	}
	if m.ram != nil {
		if err := unix.MunmapPtr(unsafe.Pointer(&m.ram[0]), uintptr(len(m.ram))); err != nil {
			errs = append(errs, fmt.Errorf("munmap guest memory: %w", err))
		}
		m.ram, m.slots, m.low, m.high = nil, nil, 0, 0
	}
	if m.fd >= 0 {
		if err := unix.Close(m.fd); err != nil {
			errs = append(errs, fmt.Errorf("close memfd of guest memory: %w", err))
		}
		m.fd = -1
	}
	return errors.Join(errs...)
}

// Size returns the size of the RAM in bytes.
func (m *Memory) Size() uint64 { return m.low + m.high }

// Slots returns the slots in the order of their guest physical addresses. Other
// methods identify a slot by its index in this list, which does not change.
func (m *Memory) Slots() []Slot {
	slots := make([]Slot, len(m.slots))
	for i := range m.slots {
		slots[i] = m.slots[i].Slot
	}
	return slots
}

// offset returns the offset of [gpa, gpa+n) in m.ram. The range must not extend into
// the hole below 4 GiB. An empty range may start at the end of RAM.
func (m *Memory) offset(gpa, n uint64) (uint64, error) {
	if n <= m.low && gpa <= m.low-n {
		return gpa, nil
	}
	if gpa >= HoleEnd && n <= m.high && gpa-HoleEnd <= m.high-n {
		return m.low + gpa - HoleEnd, nil
	}
	return 0, fmt.Errorf("guest memory at gpa %#x, %d bytes: %w", gpa, n, errNotRAM)
}

// at returns the slot of the byte at offset off in m.ram, and the offset in the slot.
func (m *Memory) at(off uint64) (index int, inSlot uint64) {
	if off < m.low {
		return int(off / m.unit), off % m.unit
	}
	off -= m.low
	return int(m.lows + off/m.unit), off % m.unit
}

// pageRange checks pages [first, first+n) of a slot and returns the slot.
func (m *Memory) pageRange(index int, first, n uint64) (*slot, error) {
	if index < 0 || index >= len(m.slots) {
		return nil, fmt.Errorf("memory slot %d: the guest has %d", index, len(m.slots))
	}
	s := &m.slots[index]
	if n > s.pages() || first > s.pages()-n {
		return nil, fmt.Errorf("memory slot %d, %d pages from page %#x: the slot has %#x pages", index, n, first, s.pages())
	}
	return s, nil
}

// SlotBytes returns the memory of pages [first, first+n) of a slot, not a copy. It
// panics if the range is not inside the slot. Call [Memory.MarkDirty] after writing
// to it, except at a migration's destination before the guest runs.
func (m *Memory) SlotBytes(index int, first, n uint64) []byte {
	s, err := m.pageRange(index, first, n)
	if err != nil {
		panic(err)
	}
	_ = m.await(s.off+first<<mempage.Shift, n<<mempage.Shift) // after an error no access faults either
	return s.ram[first<<mempage.Shift : (first+n)<<mempage.Shift : (first+n)<<mempage.Shift]
}

// pageSizeOfHost is the host's page size.
var pageSizeOfHost = os.Getpagesize()
