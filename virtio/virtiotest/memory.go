// Package virtiotest is the driver's side of virtio, for tests of devices: guest
// memory that records dirty marks, drivers of split and packed rings, and a driver
// that breaks the rules ([Hostile]).
package virtiotest

import (
	"fmt"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// Memory is guest RAM from gpa Base on. It implements virtio.Memory.
//
// It is mapped memory, which the race detector does not watch: a driver and a
// device, like a vCPU and a device, access the same memory at the same time.
type Memory struct {
	Base uint64
	ram  []byte

	dirtyMu sync.Mutex
	dirty   map[uint64]bool // pages by number, from gpa 0
}

// NewMemory makes RAM of n bytes at base; both are multiples of mempage.Size.
func NewMemory(t testing.TB, base uint64, n int) *Memory {
	t.Helper()
	ram, err := syscall.Mmap(-1, 0, n, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Munmap(ram); err != nil {
			t.Error(err)
		}
	})
	return &Memory{Base: base, ram: ram, dirty: map[uint64]bool{}}
}

// Size is the number of bytes.
func (m *Memory) Size() uint64 { return uint64(len(m.ram)) }

// Slice returns the memory of [gpa, gpa+n).
func (m *Memory) Slice(gpa, n uint64) ([]byte, error) {
	if gpa < m.Base || n > m.Size() || gpa-m.Base > m.Size()-n {
		return nil, fmt.Errorf("test memory at gpa %#x, %d bytes: not RAM", gpa, n)
	}
	off := gpa - m.Base
	return m.ram[off : off+n : off+n], nil
}

// MarkDirty marks the pages of [gpa, gpa+n).
func (m *Memory) MarkDirty(gpa, n uint64) error {
	if _, err := m.Slice(gpa, n); err != nil || n == 0 {
		return err
	}
	m.dirtyMu.Lock()
	defer m.dirtyMu.Unlock()
	for page := gpa / mempage.Size; page <= (gpa+n-1)/mempage.Size; page++ {
		m.dirty[page] = true
	}
	return nil
}

// ReadAt copies out of memory.
func (m *Memory) ReadAt(p []byte, gpa uint64) error {
	b, err := m.Slice(gpa, uint64(len(p)))
	copy(p, b)
	return err
}

// WriteAt copies into memory and marks it.
func (m *Memory) WriteAt(p []byte, gpa uint64) error {
	b, err := m.Slice(gpa, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(b, p)
	return m.MarkDirty(gpa, uint64(len(p)))
}

// Snapshot returns a copy of all memory and forgets the marks.
func (m *Memory) Snapshot() []byte {
	m.dirtyMu.Lock()
	defer m.dirtyMu.Unlock()
	clear(m.dirty)
	return append([]byte(nil), m.ram...)
}

// Unmarked returns the gpas of pages that differ from a snapshot and were not marked
// since: a migration would lose them.
func (m *Memory) Unmarked(before []byte) []uint64 {
	m.dirtyMu.Lock()
	defer m.dirtyMu.Unlock()
	var lost []uint64
	for off := 0; off < len(m.ram); off += mempage.Size {
		gpa := m.Base + uint64(off)
		if string(m.ram[off:off+mempage.Size]) != string(before[off:off+mempage.Size]) && !m.dirty[gpa/mempage.Size] {
			lost = append(lost, gpa)
		}
	}
	return lost
}

// Break makes the page at gpa one that the host cannot access.
func (m *Memory) Break(t testing.TB, gpa uint64) {
	t.Helper()
	page, err := m.Slice(gpa&^(mempage.Size-1), mempage.Size)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.MemfdCreate("empty", unix.MFD_CLOEXEC) // beyond the end of a file is SIGBUS
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	at := unsafe.Pointer(unsafe.SliceData(page))
	if _, err := unix.MmapPtr(fd, 0, at, mempage.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
		t.Fatal(err)
	}
}
