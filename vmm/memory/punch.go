package memory

import (
	"errors"
	"fmt"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// Zero makes pages [first, first+n) of the slot read as zero. Memfd and anonymous
// memory become holes: the host memory is freed. Hugetlb memory is only cleared, as
// far as it is populated, because the pool does not guarantee that a freed page can
// be allocated again. Zero does not change the VMM's dirty bitmap: it is for a
// migration's destination. See also [Memory.Punch].
func (m *Memory) Zero(index int, first, n uint64) error {
	s, err := m.pageRange(index, first, n)
	if err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	ram := s.ram[first<<mempage.Shift : (first+n)<<mempage.Shift]
	if m.mapped != nil {
		if err := m.zeroMapped(s, first, n); err != nil {
			return fmt.Errorf("zero %d pages at page %#x of memory slot %d: %w", n, first, index, err)
		}
		return nil
	}
	switch m.backing {
	case Memfd:
		const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
		err = retryEINTR(func() error { return unix.Fallocate(m.fd, mode, int64(s.off+first<<mempage.Shift), int64(len(ram))) })
		m.extents.punch(int64(s.off+first<<mempage.Shift), int64(s.off+(first+n)<<mempage.Shift))
		if err != nil {
			return fmt.Errorf("punch %d pages at page %#x out of memory slot %d: %w", n, first, index, err)
		}
	case Anonymous:
		if err := retryEINTR(func() error { return unix.Madvise(ram, unix.MADV_DONTNEED) }); err != nil {
			return fmt.Errorf("MADV_DONTNEED of %d pages at page %#x of memory slot %d: %w", n, first, index, err)
		}
	case Hugetlb:
		var err error
		if ferr := m.eachPopulated(s, first, n, func(at, n uint64) bool {
			err = guard(func() { clear(ram[at<<mempage.Shift : (at+n)<<mempage.Shift]) })
			return err == nil
		}); ferr != nil {
			err = ferr
		}
		if err != nil {
			return fmt.Errorf("zero %d pages at page %#x of memory slot %d: %w", n, first, index, err)
		}
	}
	return nil
}

// Punch frees the host memory of [gpa, gpa+n) for a balloon; the guest then reads
// zeros there. gpa and n are multiples of [mempage.Size]. Punch sets the pages' bits
// in the VMM's dirty bitmap: a migration that has sent their old content must send
// that they are zero.
func (m *Memory) Punch(gpa, n uint64) error {
	if gpa%mempage.Size != 0 || n%mempage.Size != 0 {
		return fmt.Errorf("punch %d bytes at gpa %#x out of guest memory: must be whole pages", n, gpa)
	}
	off, err := m.offset(gpa, n)
	if err != nil {
		return err
	}
	// All pages are marked also after an error: some may be punched out.
	defer m.mark(off, n)
	for n > 0 {
		index, at := m.at(off)
		count := min(n, m.slots[index].Size-at)
		if x := m.missing.Load(); x != nil {
			err = x.giveUp(index, at>>mempage.Shift, count>>mempage.Shift)
		} else {
			err = m.Zero(index, at>>mempage.Shift, count>>mempage.Shift)
		}
		if err != nil {
			return err
		}
		off, n = off+count, n-count
	}
	return nil
}

// retryEINTR repeats f while a signal interrupts it.
func retryEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
