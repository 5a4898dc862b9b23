package migrate

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"github.com/govmm/govmm/mempage"
)

// PageError is the error of a page of guest memory that a host cannot access. It ends
// the migration: without the page the guest would not be the same.
type PageError struct {
	GPA uint64 // guest physical address of the page
}

func (e *PageError) Error() string {
	return fmt.Sprintf("guest memory at gpa %#x: the host cannot access the page: its hardware has failed, or there is no memory for it", e.GPA)
}

// guard calls f, which accesses span, the memory of pages from first of the slot. A
// page that the host cannot access becomes a [*PageError], also if it was a system
// call that met it.
func guard(ram RAM, slot int, first uint64, span []byte, f func() error) error {
	err := mempage.Guard(f)
	if err == nil {
		return nil
	}
	at := func(page uint64) error { return &PageError{ram.Slots()[slot].GPA + (first+page)*mempage.Size} }
	if fault := (*mempage.Fault)(nil); errors.As(err, &fault) {
		if off := fault.Addr - uintptr(unsafe.Pointer(unsafe.SliceData(span))); off < uintptr(len(span)) {
			return at(uint64(off / mempage.Size))
		}
		return err
	}
	if !errors.Is(err, syscall.EFAULT) {
		return err
	}
	for page := range uint64(len(span) / mempage.Size) {
		var seen byte
		if mempage.Guard(func() error { seen |= span[page*mempage.Size]; return nil }) != nil {
			return at(page)
		}
	}
	return err
}

// pageIsZero reports whether a page reads as zero.
func pageIsZero(ram RAM, slot int, page uint64) (zero bool, err error) {
	span := ram.Bytes(slot, page, 1)
	err = guard(ram, slot, page, span, func() error { zero = isZero(span); return nil })
	return zero, err
}
