package memory

import "encoding/binary"

// ReadAt copies guest memory at gpa into p. It fails with a [RangeError], and
// copies nothing, unless the whole range is contiguous RAM.
func (m *Memory) ReadAt(p []byte, gpa uint64) error {
	off, err := m.offset(gpa, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(p, m.ram[off:])
	return nil
}

// WriteAt copies p to guest memory at gpa and marks the pages in the VMM's
// dirty bitmap. It fails with a [RangeError], and copies nothing, unless the
// whole range is contiguous RAM.
func (m *Memory) WriteAt(p []byte, gpa uint64) error {
	off, err := m.offset(gpa, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(m.ram[off:], p)
	m.mark(off, uint64(len(p)))
	return nil
}

// ReadUint16 reads a little-endian word of 2 bytes.
func (m *Memory) ReadUint16(gpa uint64) (uint16, error) {
	off, err := m.offset(gpa, 2)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint16(m.ram[off:]), nil
}

// ReadUint32 reads a little-endian word of 4 bytes.
func (m *Memory) ReadUint32(gpa uint64) (uint32, error) {
	off, err := m.offset(gpa, 4)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(m.ram[off:]), nil
}

// ReadUint64 reads a little-endian word of 8 bytes.
func (m *Memory) ReadUint64(gpa uint64) (uint64, error) {
	off, err := m.offset(gpa, 8)
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(m.ram[off:]), nil
}

// WriteUint16 writes a little-endian word of 2 bytes and marks its page.
func (m *Memory) WriteUint16(gpa uint64, v uint16) error {
	off, err := m.offset(gpa, 2)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint16(m.ram[off:], v)
	m.mark(off, 2)
	return nil
}

// WriteUint32 writes a little-endian word of 4 bytes and marks its page.
func (m *Memory) WriteUint32(gpa uint64, v uint32) error {
	off, err := m.offset(gpa, 4)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(m.ram[off:], v)
	m.mark(off, 4)
	return nil
}

// WriteUint64 writes a little-endian word of 8 bytes and marks its page.
func (m *Memory) WriteUint64(gpa uint64, v uint64) error {
	off, err := m.offset(gpa, 8)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint64(m.ram[off:], v)
	m.mark(off, 8)
	return nil
}

// Slice returns guest memory [gpa, gpa+n) itself, not a copy, or a
// [RangeError]. It is for reading, and for system calls that read or write
// guest memory in place. Who lets anything write to it calls [Memory.MarkDirty]
// after the bytes have landed and before the guest can learn of them.
func (m *Memory) Slice(gpa, n uint64) ([]byte, error) {
	off, err := m.offset(gpa, n)
	if err != nil {
		return nil, err
	}
	return m.ram[off : off+n : off+n], nil
}
