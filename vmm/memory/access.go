package memory

import (
	"fmt"

	"github.com/govmm/govmm/mempage"
)

// ReadAt copies guest memory at gpa into p. It fails, and copies nothing, unless the
// whole range is contiguous RAM; and it fails at a page that the host cannot access.
func (m *Memory) ReadAt(p []byte, gpa uint64) error {
	off, err := m.offset(gpa, uint64(len(p)))
	if err != nil {
		return err
	}
	if err = m.await(off, uint64(len(p))); err == nil {
		err = guard(func() { copy(p, m.ram[off:]) })
	}
	if err != nil {
		return fmt.Errorf("read %d bytes of guest memory at gpa %#x: %w", len(p), gpa, err)
	}
	return nil
}

// WriteAt copies p to guest memory at gpa and sets the pages' bits in the VMM's
// dirty bitmap. It fails, and copies nothing, unless the whole range is contiguous
// RAM; and it fails at a page that the host cannot access.
func (m *Memory) WriteAt(p []byte, gpa uint64) error {
	off, err := m.offset(gpa, uint64(len(p)))
	if err != nil {
		return err
	}
	if err = m.await(off, uint64(len(p))); err == nil {
		err = guard(func() { copy(m.ram[off:], p) })
	}
	m.mark(off, uint64(len(p)))
	if err != nil {
		return fmt.Errorf("write %d bytes of guest memory at gpa %#x: %w", len(p), gpa, err)
	}
	return nil
}

// guard turns a fault of an access into an error: see [mempage.Guard].
func guard(access func()) error {
	return mempage.Guard(func() error { access(); return nil })
}

// Slice returns guest memory [gpa, gpa+n), not a copy. It fails unless the whole
// range is contiguous RAM. It is for reading, and for system calls that read or
// write guest memory in place. Call [Memory.MarkDirty] after a write to it and
// before the guest can know of the write.
func (m *Memory) Slice(gpa, n uint64) ([]byte, error) {
	off, err := m.offset(gpa, n)
	if err != nil {
		return nil, err
	}
	if err := m.await(off, n); err != nil {
		return nil, fmt.Errorf("%d bytes of guest memory at gpa %#x: %w", n, gpa, err)
	}
	return m.ram[off : off+n : off+n], nil
}

// Contains fails unless [gpa, gpa+n) is contiguous RAM. It touches nothing.
func (m *Memory) Contains(gpa, n uint64) error {
	_, err := m.offset(gpa, n)
	return err
}
