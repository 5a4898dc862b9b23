package memory

import (
	"errors"
	"fmt"
	"sync"

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
		data, hole, err := m.nextData(at)
		if err != nil {
			return err
		}
		if data >= end {
			return nil
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

// nextData returns the first range of data from at on, or the end of the file.
func (m *Memory) nextData(at int64) (data, hole int64, err error) {
	if to, ok := m.extents.find(at); ok {
		return at, to, nil
	}
	size, before := int64(m.Size()), m.extents.state()
	data, err = unix.Seek(m.fd, at, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("SEEK_DATA in guest memory at %#x: %w", at, err)
	}
	if to, ok := m.extents.find(data); ok {
		return data, to, nil
	}
	hole, err = unix.Seek(m.fd, data, unix.SEEK_HOLE)
	if errors.Is(err, unix.ENXIO) {
		return size, size, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("SEEK_HOLE in guest memory at %#x: %w", data, err)
	}
	m.extents.add(data, hole, before)
	return data, hole, nil
}

// dataExtents remembers the longest ranges of data that were found in a memfd. The kernel
// looks at every page of a range to find its end, and a migration asks for a few pages at a
// time: it would do so again and again for gigabytes. What is remembered may be shorter than
// the data is, and only punching ends it.
type dataExtents struct {
	extentMu sync.Mutex // guards the fields below
	longest  [16]struct{ from, to int64 }
	punched  uint64 // how often something was punched out
	walks    uint64 // how often the kernel was asked for an end
}

// find returns where the data at a place ends, as far as that is known.
func (d *dataExtents) find(at int64) (to int64, ok bool) {
	d.extentMu.Lock()
	defer d.extentMu.Unlock()
	for _, e := range d.longest {
		if e.from <= at && at < e.to {
			return e.to, true
		}
	}
	return 0, false
}

// state is for add.
func (d *dataExtents) state() uint64 {
	d.extentMu.Lock()
	defer d.extentMu.Unlock()
	return d.punched
}

// add remembers a range that was found since state was called, unless a part of it may have
// been punched out.
func (d *dataExtents) add(from, to int64, state uint64) {
	d.extentMu.Lock()
	defer d.extentMu.Unlock()
	d.walks++
	if d.punched != state {
		return
	}
	least := 0
	for i := range d.longest {
		e := &d.longest[i]
		if from <= e.to && e.from <= to { // it has grown
			from, to = min(from, e.from), max(to, e.to)
			e.from, e.to = 0, 0
		}
		if l := d.longest[least]; e.to-e.from < l.to-l.from {
			least = i
		}
	}
	if e := &d.longest[least]; to-from > e.to-e.from {
		e.from, e.to = from, to
	}
}

// punch forgets what was punched out; of each range the longer one of two pieces stays.
func (d *dataExtents) punch(from, to int64) {
	d.extentMu.Lock()
	defer d.extentMu.Unlock()
	d.punched++
	for i := range d.longest {
		e := &d.longest[i]
		switch {
		case e.to <= from || to <= e.from:
		case from-e.from > e.to-to:
			e.to = from
		default:
			e.from = min(to, e.to)
		}
	}
}
