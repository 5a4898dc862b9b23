package migrate

import (
	"errors"
	"fmt"
	"slices"
)

// blocks applies a BLOCKS frame.
func (in *inlet) blocks(f header) error {
	s := in.session
	if !slices.Contains(s.features, featureDisks) || int(f.slot) >= len(s.copies) {
		return fmt.Errorf("%w: BLOCKS for disk %d of %d that are copied", ErrProtocol, f.slot, len(s.copies))
	}
	disk := s.copies[f.slot]
	all := blocksOf(disk.Size())
	if f.count == 0 || f.first >= all || uint64(f.count) > all-f.first {
		return fmt.Errorf("%w: BLOCKS [%#x,+%#x) of a disk of %#x blocks", ErrProtocol, f.first, f.count, all)
	}
	off := f.first * BlockSize
	n := min((f.first+uint64(f.count))*BlockSize, disk.Size()) - off
	if f.flags != flagReserve {
		s.pass(true, int(f.slot), f.first+uint64(f.count))
	}
	switch {
	case f.flags == flagZero && f.length == 0:
		return disk.Zero(off, n)
	case f.flags == flagReserve && f.length == 0:
		return disk.Reserve(off, n)
	case f.flags != 0 || f.count > blocksOfFrame || uint64(f.length) != n:
		return fmt.Errorf("%w: BLOCKS of %d blocks, with flags %#x and %d bytes of content", ErrProtocol, f.count, f.flags, f.length)
	}
	if in.block == nil {
		in.block = make([]byte, blocksOfFrame*BlockSize)
	}
	content := in.block[:n]
	if err := in.conn.readFull(content); err != nil {
		return err
	}
	return disk.Write(content, off)
}

// syncDisks makes durable what has landed of the disks.
func (s *session) syncDisks() error {
	errs := make([]error, len(s.copies))
	done := make(chan struct{}, len(s.copies))
	for i, c := range s.copies {
		go func() {
			errs[i] = c.Sync()
			done <- struct{}{}
		}()
	}
	for range s.copies {
		<-done
	}
	return errors.Join(errs...)
}
