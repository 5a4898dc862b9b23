package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of the auxiliary vector (getauxval(3)) and the program headers (elf(5)).
const (
	atPHDR  = 3
	atPHNUM = 5
	ptLoad  = 1
	ptPHDR  = 6
	pfWrite = 2
)

// programHeader is ELF64's.
type programHeader struct {
	kind, flags            uint32
	offset, virtual, phys  uint64
	inFile, inMemory, unit uint64
}

// unmapProgram takes the pages of the program itself, its code and constants, out of the
// process. The host's page cache keeps them and has them back at the next touch, for a
// microsecond each; but what only a start has touched, more than half of them, is no longer
// counted as this VM's, and the host may forget it when it needs memory.
func unmapProgram() {
	for _, m := range readOnly() {
		_ = unix.Madvise(m, unix.MADV_DONTNEED) // where it fails they stay
	}
}

// readOnly returns the mappings of the program that nobody writes, in whole pages.
func readOnly() (list [][]byte) {
	vector, err := unix.Auxv()
	if err != nil {
		return nil
	}
	var at, n uintptr
	for _, v := range vector {
		switch v[0] {
		case atPHDR:
			at = v[1]
		case atPHNUM:
			n = v[1]
		}
	}
	if at == 0 || n == 0 {
		return nil
	}
	headers := unsafe.Slice((*programHeader)(*(*unsafe.Pointer)(unsafe.Pointer(&at))), n)
	var moved uint64 // where it was loaded, less where it was linked to be
	for _, h := range headers {
		if h.kind == ptPHDR {
			moved = uint64(at) - h.virtual
		}
	}
	page := uint64(unix.Getpagesize())
	for _, h := range headers {
		if h.kind != ptLoad || h.flags&pfWrite != 0 {
			continue
		}
		start, end := (h.virtual+moved)&^(page-1), (h.virtual+moved+h.inMemory)&^(page-1)
		if start < end {
			p := uintptr(start)
			list = append(list, unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&p))), end-start))
		}
	}
	return list
}
