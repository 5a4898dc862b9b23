package virtio

import (
	"encoding/binary"
	"sync/atomic"
	"unsafe"
)

// Running vCPUs share the rings, so the words by which the two sides hand over
// to each other are accessed atomically. Go has no atomic access to 2 bytes; the
// 4-byte word around them is accessed instead.
//
// On x86 Go's atomic stores are locked exchanges, and so full barriers: a load
// that follows is not done before the store. EVENT_IDX, where each side stores
// its index and then loads the other side's event, needs that.

// load32 loads b[off:off+4], before anything that follows in the program. It is
// aligned to 4 in guest memory, and so here.
func load32(b []byte, off int) uint32 {
	return atomic.LoadUint32((*uint32)(unsafe.Pointer(unsafe.SliceData(b[off : off+4]))))
}

// store32 stores b[off:off+4], aligned to 4, after everything that precedes it
// in the program, and before everything that follows.
func store32(b []byte, off int, v uint32) {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(unsafe.SliceData(b[off:off+4]))), v)
}

// load16 loads b[off:off+2], aligned to 2. The aligned 4-byte word around it may
// begin before b, but lies in the same page.
func load16(b []byte, off int) uint16 {
	p := unsafe.Pointer(unsafe.SliceData(b[off : off+2]))
	inside := uintptr(p) & 2
	word := atomic.LoadUint32((*uint32)(unsafe.Add(p, -int(inside))))
	return uint16(word >> (8 * inside))
}

// Descriptor flags, sections 2.7.5 and 2.8.1.
const (
	descNext     = 1 << 0
	descWrite    = 1 << 1
	descIndirect = 1 << 2
	descAvail    = 1 << 7  // packed only
	descUsed     = 1 << 15 // packed only
)

const descSize = 16

// desc is a descriptor of either layout. It is copied out of guest memory once,
// so that what is used is what was checked.
type desc struct {
	addr uint64
	len  uint32
	lo   uint16 // split: flags; packed: buffer id
	hi   uint16 // split: next; packed: flags
}

func readDesc(table []byte, index int) desc {
	b := table[index*descSize : index*descSize+descSize]
	return desc{
		addr: binary.LittleEndian.Uint64(b),
		len:  binary.LittleEndian.Uint32(b[8:]),
		lo:   binary.LittleEndian.Uint16(b[12:]),
		hi:   binary.LittleEndian.Uint16(b[14:]),
	}
}
