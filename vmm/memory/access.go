package memory

// ReadAt copies guest memory at gpa into p. It fails, and copies nothing, unless the
// whole range is contiguous RAM.
func (m *Memory) ReadAt(p []byte, gpa uint64) error {
	off, err := m.offset(gpa, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(p, m.ram[off:])
	return nil
}

// WriteAt copies p to guest memory at gpa and sets the pages' bits in the VMM's
// dirty bitmap. It fails, and copies nothing, unless the whole range is contiguous
// RAM.
func (m *Memory) WriteAt(p []byte, gpa uint64) error {
	off, err := m.offset(gpa, uint64(len(p)))
	if err != nil {
		return err
	}
	copy(m.ram[off:], p)
	m.mark(off, uint64(len(p)))
	return nil
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
	return m.ram[off : off+n : off+n], nil
}
