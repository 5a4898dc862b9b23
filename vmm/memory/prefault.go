package memory

import (
	"fmt"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// Prefault populates pages [first, first+n) of the slot, with huge pages if the
// backing has them, so that later writes cause no page faults. It does not change
// their content; holes become populated pages of zeros. It fails on Linux before
// 5.14, which has no MADV_POPULATE_WRITE, and if memory is short.
func (m *Memory) Prefault(index int, first, n uint64) error {
	s, err := m.pageRange(index, first, n)
	if err != nil || n == 0 {
		return err
	}
	ram := s.ram[first<<mempage.Shift : (first+n)<<mempage.Shift]
	if err := retryEINTR(func() error { return unix.Madvise(ram, unix.MADV_POPULATE_WRITE) }); err != nil {
		return fmt.Errorf("MADV_POPULATE_WRITE of %d pages at page %#x of memory slot %d: %w", n, first, index, err)
	}
	return nil
}
