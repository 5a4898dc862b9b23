package memory

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Layout returns the slots of a guest with so much memory, without host addresses. In a
// file of guest memory they lie one after another.
func Layout(size uint64) (slots []Slot) {
	unit, low := slotSize(size), min(size, HoleStart)
	cut := func(gpa, n uint64) {
		for ; n > 0; gpa, n = gpa+min(n, unit), n-min(n, unit) {
			slots = append(slots, Slot{GPA: gpa, Size: min(n, unit)})
		}
	}
	cut(0, low)
	cut(HoleEnd, size-low)
	return slots
}

// Bytes returns all of the memory in the order of the slots, as it lies in a file. It is
// for filling it before anything else uses it.
func (m *Memory) Bytes() []byte { return m.ram }

// Extents calls found for each range of [start, end) of a file that is not a hole, in
// order, until it returns an error. A file system that does not know holes has none.
func Extents(fd int, start, end int64, found func(start, end int64) error) error {
	for at := start; at < end; {
		data, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && data >= end {
			return nil // no more data
		}
		if err != nil {
			return err
		}
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if errors.Is(err, unix.ENXIO) {
			return nil // it was cut off
		}
		if err != nil {
			return err
		}
		if err := found(data, min(hole, end)); err != nil {
			return err
		}
		at = max(hole, data+1)
	}
	return nil
}
