package memory

import (
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// hugeMissing is what memory of huge pages needs to come later. The kernel has a huge page
// as a whole or not at all, and what is missing are pages of 4 KiB.
//
// So the memory's file is mapped once more. A huge page of which anything is missing is
// taken out of the guest's page table, and stays in the file with what it has. What comes is
// written by the second mapping, where only this package looks. When nothing of the huge
// page is missing any more, it goes into the guest's page table as it is (UFFDIO_CONTINUE),
// for good. So what is written to a page comes before anything that the guest does with it;
// that each page is written once is what claiming it is for.
type hugeMissing struct {
	file  []byte         // the second mapping
	lacks []atomic.Int32 // by huge page of the memory: how many of its pages have not come
	taken mempage.Bitmap // huge pages that lacked something at the start
}

const hugeGrain = hugePageSize / mempage.Size

// openHuge maps the file again, and counts what is missing of each huge page.
func (x *Missing) openHuge() error {
	file, err := mapAligned(x.mem.fd, x.mem.Size(), unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the file of guest memory again: %w", err)
	}
	h := &hugeMissing{file: file, lacks: make([]atomic.Int32, x.mem.hugePages()), taken: mempage.NewBitmap(x.mem.hugePages())}
	x.huge, x.grain = h, hugeGrain
	for i := range x.slots {
		first := x.mem.slots[i].off / hugePageSize
		for w, word := range x.slots[i].absent {
			if word != 0 {
				at := first + uint64(w)/(hugeGrain/64)
				h.lacks[at].Add(int32(bits.OnesCount64(word)))
				h.taken.SetRange(at, 1)
			}
		}
	}
	return advise(file, false)
}

// eachTaken calls f with the guest's mapping of each run of huge pages that lacked something.
func (x *Missing) eachTaken(f func(ram []byte) error) error {
	h, end := x.huge, x.mem.hugePages()
	for at := h.taken.NextSet(0, end); at < end; {
		behind := h.taken.NextClear(at, end)
		if err := f(x.mem.ram[at*hugePageSize : behind*hugePageSize]); err != nil {
			return err
		}
		at = h.taken.NextSet(behind, end)
	}
	return nil
}

// hideHuge takes huge pages that lack something out of the guest's page table.
func (x *Missing) hideHuge() error {
	if x.huge == nil {
		return nil
	}
	return x.eachTaken(func(ram []byte) error {
		if err := retryEINTR(func() error { return unix.Madvise(ram, unix.MADV_DONTNEED) }); err != nil {
			return fmt.Errorf("MADV_DONTNEED of %d huge pages: %w", len(ram)/hugePageSize, err)
		}
		return nil
	})
}

// write puts content where the guest will find it.
func (h *hugeMissing) write(s *slot, first uint64, content []byte) error {
	return guard(func() { copy(h.file[s.off+first<<mempage.Shift:], content) })
}

// clear is write of zeros.
func (h *hugeMissing) clear(s *slot, first, n uint64) error {
	at := s.off + first<<mempage.Shift
	return guard(func() { clear(h.file[at : at+n<<mempage.Shift]) })
}

// cameHuge notes that pages of a word have come. whole is false if the guest does not see
// them yet.
func (x *Missing) cameHuge(index int, w, mine uint64) (whole bool, err error) {
	if x.huge == nil {
		return true, nil
	}
	s := &x.mem.slots[index]
	page, _ := x.round(w*64, 1)
	if x.huge.lacks[(s.off+page<<mempage.Shift)/hugePageSize].Add(-int32(bits.OnesCount64(mine))) > 0 {
		return false, nil
	}
	return true, x.showHuge(s, page)
}

// showHuge lets the guest see a huge page, which the file has.
func (x *Missing) showHuge(s *slot, page uint64) error {
	if err := x.faults.show(s.HVA + uintptr(page<<mempage.Shift)); err != nil {
		return fmt.Errorf("UFFDIO_CONTINUE of the huge page at page %#x at %#x: %w", page, s.GPA, err)
	}
	return nil
}

// makeHuge is showHuge of one that the file may not have yet.
func (x *Missing) makeHuge(s *slot, page uint64) error {
	at := s.off + page<<mempage.Shift
	if err := retryEINTR(func() error { return unix.Madvise(x.huge.file[at:at+hugePageSize], unix.MADV_POPULATE_WRITE) }); err != nil {
		return fmt.Errorf("MADV_POPULATE_WRITE of the huge page at page %#x at %#x: %w", page, s.GPA, err)
	}
	return x.showHuge(s, page)
}

// giveUpHuge clears pages that the guest has given up and that are not missing. What does
// not exist stays so.
func (x *Missing) giveUpHuge(index int, first, n uint64) error {
	if !x.enter() {
		<-x.gone
		return x.mem.Zero(index, first, n)
	}
	defer x.leave()
	s := &x.mem.slots[index]
	for end := first + n; first < end; {
		start, grain := x.round(first, 1)
		n := min(start+grain, end) - first
		exists := x.huge.taken.Get((s.off + start<<mempage.Shift) / hugePageSize)
		if !exists {
			err := x.mem.eachPopulated(s, first, n, func(uint64, uint64) bool { exists = true; return false })
			if err != nil {
				return err
			}
		}
		if exists {
			if err := x.huge.clear(s, first, n); err != nil {
				return err
			}
		}
		first += n
	}
	return nil
}

// zeroHuge makes zero what has not come, before all is given up.
func (x *Missing) zeroHuge() error {
	if x.huge == nil || x.Left() == 0 {
		return nil
	}
	var err error
	for i := range x.slots {
		end := x.mem.slots[i].pages()
		absent := mempage.Bitmap(x.slots[i].absent)
		for at := absent.NextSet(0, end); at < end && err == nil; {
			behind := absent.NextClear(at, end)
			err = x.huge.clear(&x.mem.slots[i], at, behind-at)
			at = absent.NextSet(behind, end)
		}
	}
	return err
}

// closeHuge puts all huge pages into the page table, which is where this package finds out
// what exists, and ends the second mapping.
func (x *Missing) closeHuge() error {
	if x.huge == nil {
		return nil
	}
	err := x.eachTaken(func(ram []byte) error {
		if err := retryEINTR(func() error { return unix.Madvise(ram, unix.MADV_POPULATE_WRITE) }); err != nil {
			return fmt.Errorf("MADV_POPULATE_WRITE of %d huge pages: %w", len(ram)/hugePageSize, err)
		}
		return nil
	})
	file := x.huge.file
	if unmap := unix.MunmapPtr(unsafe.Pointer(&file[0]), uintptr(len(file))); unmap != nil {
		err = errors.Join(err, fmt.Errorf("munmap the file of guest memory: %w", unmap))
	}
	return err
}
