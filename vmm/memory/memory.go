// Package memory is guest physical memory: where it comes from on the host,
// how it lies in the guest, and the only way by which the VMM writes to it.
//
// RAM of up to 3 GiB starts at guest physical address (gpa) 0; what is above
// that lies from 4 GiB on, so that the last GiB below 4 GiB is free for
// devices. It is cut into [Slot]s of at most 1 GiB, each to be registered as
// one KVM memory slot, so that the dirty log of a part can be fetched and
// cleared by itself.
//
// KVM logs what vCPUs and the kernel write. It cannot see what this process
// writes, so every write through this package sets a bit in a bitmap of its
// own, after the bytes have landed ([Memory.FetchDirty] takes the bits). A
// live migration needs both logs.
//
// docs/memory.md says which backing to choose and has the measurements.
package memory

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

const (
	// SlotSize is the largest size of a slot in bytes.
	SlotSize = 1 << 30
	// HoleStart and HoleEnd bound the guest physical addresses that are never
	// RAM: PCI windows, the IOAPIC and the local APICs live there.
	HoleStart = 3 << 30
	// HoleEnd is the first address above the hole, in bytes.
	HoleEnd = 4 << 30
	// MinSize and MaxSize bound the size of a guest's memory in bytes.
	MinSize = 1 << 20
	// MaxSize is 16 TiB.
	MaxSize = 16 << 40

	hugePageSize = 2 << 20
)

// ErrNotRAM is wrapped by the error of every access to a range of guest
// physical addresses that is not inside one contiguous run of RAM.
var ErrNotRAM = errors.New("not guest RAM")

// RangeError is an access to guest physical addresses that are not all RAM. It
// wraps [ErrNotRAM].
type RangeError struct {
	GPA uint64 // first address
	N   uint64 // length in bytes
}

// Error says which range was asked for.
func (e *RangeError) Error() string {
	return fmt.Sprintf("guest memory at gpa %#x, %d bytes: %v", e.GPA, e.N, ErrNotRAM)
}

// Unwrap returns [ErrNotRAM].
func (e *RangeError) Unwrap() error { return ErrNotRAM }

// Slot is a run of RAM that is contiguous in guest physical and in host
// virtual memory, to be registered as one KVM memory slot.
type Slot struct {
	GPA  uint64  // guest physical address of the first byte
	Size uint64  // length in bytes, a multiple of [mempage.Size], at most [SlotSize]
	HVA  uintptr // host virtual address of the first byte
}

// slot is a Slot and what the VMM knows about it.
type slot struct {
	Slot
	ram   []byte   // the memory itself
	off   uint64   // where ram starts in Memory.ram, in bytes
	dirty []uint64 // the VMM's own writes, one bit a page; only atomic access
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
	fd      int      // the memfd, or -1
	pagemap *pagemap // nil where holes are found by other means
}

// New makes guest memory of size bytes. Nothing is populated: pages come to be
// when they are first written. size must be a multiple of [mempage.Size] (of 2 MiB
// for [Hugetlb]) from [MinSize] to [MaxSize].
func New(size uint64, b Backing) (*Memory, error) {
	if _, err := ParseBacking(string(b)); err != nil {
		return nil, err
	}
	unit := uint64(mempage.Size)
	if b == Hugetlb {
		unit = hugePageSize
	}
	if size < MinSize || size > MaxSize {
		return nil, fmt.Errorf("guest memory of %d bytes: must be from 1 MiB to 16 TiB", size)
	}
	if size%unit != 0 {
		return nil, fmt.Errorf("guest memory of %d bytes: must be a multiple of %d KiB for backing %s", size, unit>>10, b)
	}
	m := &Memory{backing: b, low: min(size, HoleStart), fd: -1}
	m.high = size - m.low
	if err := m.open(size); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	m.cut(0, 0, m.low)
	m.cut(HoleEnd, m.low, m.high)
	return m, nil
}

// cut adds the slots of n bytes of RAM that start at gpa, and at off in m.ram.
func (m *Memory) cut(gpa, off, n uint64) {
	for n > 0 {
		size := min(n, SlotSize)
		ram := m.ram[off : off+size : off+size]
		m.slots = append(m.slots, slot{
			Slot:  Slot{GPA: gpa, Size: size, HVA: uintptr(unsafe.Pointer(&ram[0]))},
			ram:   ram,
			off:   off,
			dirty: make([]uint64, mempage.Words(size>>mempage.Shift)),
		})
		gpa, off, n = gpa+size, off+size, n-size
	}
}

// Close gives the memory back. The caller makes sure that nothing uses it any
// more: no vCPU runs, KVM's slots are gone, and no slice of it is in use.
func (m *Memory) Close() error {
	var errs []error
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
	if m.pagemap != nil {
		errs = append(errs, m.pagemap.close())
		m.pagemap = nil
	}
	return errors.Join(errs...)
}

// Size returns the size of the RAM in bytes.
func (m *Memory) Size() uint64 { return m.low + m.high }

// Backing returns what New was given.
func (m *Memory) Backing() Backing { return m.backing }

// Slots lists the slots in the order of their guest physical addresses. Other
// methods name a slot by its index in this list, which does not change.
func (m *Memory) Slots() []Slot {
	slots := make([]Slot, len(m.slots))
	for i := range m.slots {
		slots[i] = m.slots[i].Slot
	}
	return slots
}

// offset returns where [gpa, gpa+n) lies in m.ram; the range must not be cut by
// the hole below 4 GiB. An empty range is inside RAM where a byte would be.
func (m *Memory) offset(gpa, n uint64) (uint64, error) {
	if n <= m.low && gpa <= m.low-n {
		return gpa, nil
	}
	if gpa >= HoleEnd && n <= m.high && gpa-HoleEnd <= m.high-n {
		return m.low + gpa - HoleEnd, nil
	}
	return 0, &RangeError{GPA: gpa, N: n}
}

// pageRange checks pages [first, first+n) of a slot and returns the slot.
func (m *Memory) pageRange(index int, first, n uint64) (*slot, error) {
	if index < 0 || index >= len(m.slots) {
		return nil, fmt.Errorf("memory slot %d: there are %d", index, len(m.slots))
	}
	s := &m.slots[index]
	if n > s.pages() || first > s.pages()-n {
		return nil, fmt.Errorf("memory slot %d, %d pages from page %#x: it has %#x pages", index, n, first, s.pages())
	}
	return s, nil
}

// SlotBytes returns the memory of pages [first, first+n) of a slot itself, not
// a copy. It panics if the range is not inside the slot. Who writes to it calls
// [Memory.MarkDirty] afterwards; a migration's destination, whose pages all
// arrive from elsewhere, need not.
func (m *Memory) SlotBytes(index int, first, n uint64) []byte {
	s, err := m.pageRange(index, first, n)
	if err != nil {
		panic(err)
	}
	return s.ram[first<<mempage.Shift : (first+n)<<mempage.Shift : (first+n)<<mempage.Shift]
}

// pageSizeOfHost is what the kernel populates at a time.
var pageSizeOfHost = os.Getpagesize()
