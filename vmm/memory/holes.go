package memory

import (
	"errors"
	"fmt"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// Populated sets bit i of bitmap if page first+i of the slot may hold data, and
// clears it if the page is a hole: never written, or punched out, so that it reads
// as zero. The call populates nothing. Pages that are swapped out are populated.
// bitmap needs ceil(n/64) words; Populated clears the bits from n on.
//
// The result is undefined for a page that the guest writes during the call: callers
// must track writes from before the call.
func (m *Memory) Populated(index int, first, n uint64, bitmap []uint64) error {
	s, err := m.pageRange(index, first, n)
	if err != nil {
		return err
	}
	if uint64(len(bitmap)) < mempage.Words(n) {
		return fmt.Errorf("bitmap of %d pages of memory slot %d: expected %d words or more, got %d", n, index, mempage.Words(n), len(bitmap))
	}
	bitmap = bitmap[:mempage.Words(n)]
	clear(bitmap)
	if n == 0 {
		return nil
	}
	return m.eachPopulated(s, first, n, func(at, count uint64) bool {
		mempage.Bitmap(bitmap).SetRange(at, count)
		return true
	})
}

// NextPopulated returns the first page of [first, first+n) of the slot that may hold
// data, or first+n if all are holes; see [Memory.Populated]. It takes the kernel about
// as long for a terabyte of holes as for a page.
func (m *Memory) NextPopulated(index int, first, n uint64) (page uint64, err error) {
	s, err := m.pageRange(index, first, n)
	if err != nil || n == 0 {
		return first + n, err
	}
	if m.inherited != nil {
		page = first + n
		err = m.inheritedPopulated(s, first, n, func(at, _ uint64) bool {
			page = first + at
			return false
		})
		return page, err
	}
	if m.mapped != nil {
		return m.nextMapped(s, first, n)
	}
	if m.backing != Memfd {
		at, err := m.pagemap.next(s.HVA+uintptr(first<<mempage.Shift), n)
		return first + at, err
	}
	start := int64(s.off + first<<mempage.Shift)
	data, err := unix.Seek(m.fd, start, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return first + n, nil // no more data
	}
	if err != nil {
		return first, fmt.Errorf("SEEK_DATA in guest memory at %#x: %w", start, err)
	}
	return first + min(uint64(data-start)>>mempage.Shift, n), nil
}

// PopulatedPages returns the number of guest pages that occupy host memory or swap.
func (m *Memory) PopulatedPages() (uint64, error) {
	total := uint64(0)
	for i := range m.slots {
		s := &m.slots[i]
		err := m.eachPopulated(s, 0, s.pages(), func(_, n uint64) bool {
			total += n
			return true
		})
		if err != nil {
			return 0, err
		}
	}
	return total, nil
}

// AtMostPopulated returns whether no more than most pages of the slot are populated. It
// looks no further than that takes. It also returns false if finding out would take long,
// on a kernel without PAGEMAP_SCAN.
func (m *Memory) AtMostPopulated(index int, most uint64) (bool, error) {
	s, err := m.pageRange(index, 0, 0)
	if err != nil || m.pagemap != nil && !m.pagemap.scan {
		return false, err
	}
	total := uint64(0)
	err = m.eachPopulated(s, 0, s.pages(), func(_, n uint64) bool {
		total += n
		return total <= most
	})
	return err == nil && total <= most, err
}

// eachPopulated calls found for each range of populated pages in [first, first+n)
// of the slot, in order, until it returns false. found's page numbers count from first.
func (m *Memory) eachPopulated(s *slot, first, n uint64, found func(at, n uint64) bool) error {
	if m.mapped != nil {
		return m.eachMapped(s, first, n, found)
	}
	if m.backing == Memfd {
		return m.bySeek(s, first, n, found)
	}
	if m.inherited != nil {
		return m.inheritedPopulated(s, first, n, found)
	}
	// Also for hugetlb: its pages cannot be swapped, and only this process has
	// the file, so a page that is not in the page table does not exist. Where a
	// process before had the file, Inherited has told what exists.
	return m.pagemap.populated(s.HVA+uintptr(first<<mempage.Shift), n, found)
}

// bySeek finds ranges by lseek in the memfd. Pages in swap are data there. Nothing
// else uses the file's position, so concurrent calls do not affect each other.
func (m *Memory) bySeek(s *slot, first, n uint64, found func(at, n uint64) bool) error {
	start := int64(s.off + first<<mempage.Shift)
	end := start + int64(n<<mempage.Shift)
	for at := start; at < end; {
		data, err := unix.Seek(m.fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // no more data
		}
		if err != nil {
			return fmt.Errorf("SEEK_DATA in guest memory at %#x: %w", at, err)
		}
		if data >= end {
			return nil
		}
		hole, err := unix.Seek(m.fd, data, unix.SEEK_HOLE)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("SEEK_HOLE in guest memory at %#x: %w", data, err)
		}
		// The last hole may start at the end of the file, and the data may be
		// punched out between the two calls.
		hole = min(hole, end)
		if hole > data && !found(uint64(data-start)>>mempage.Shift, uint64(hole-data+mempage.Size-1)>>mempage.Shift) {
			return nil
		}
		at = max(hole, data)
		if hole == data {
			at += mempage.Size
		}
	}
	return nil
}
