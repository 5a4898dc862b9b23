package virtiotest

import (
	"encoding/binary"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
)

// Buffer is one buffer of a request.
type Buffer struct {
	GPA uint64
	Len uint32
}

// Used is a request that the device has given back.
type Used struct {
	Token uint16 // what Add returned
	Len   uint32
}

// Driver is the guest's side of one queue, split or packed. It may be used by
// one goroutine at a time.
type Driver struct {
	t        testing.TB
	mem      virtio.Memory
	state    virtio.QueueState
	features uint64
	ring     driverRing
	inFlight map[uint16]bool
	// Indirect makes Add put its buffers into an indirect table of at most
	// MaxIndirect descriptors.
	Indirect bool
	tables   uint64
}

// MaxIndirect is the number of descriptors in an indirect table.
const MaxIndirect = 64

type driverRing interface {
	add(readable, writable []Buffer) (token uint16, ok bool)
	used() (Used, bool)
	wantsKick() bool
	setInterrupts(on bool)
}

// RingBytes is the memory that [NewDriver] uses for a queue of size descriptors.
func RingBytes(size uint16) uint64 {
	n := uint64(size)
	return page(n*16) + page(6+2*n) + page(6+8*n) + page(n*MaxIndirect*16)
}

func page(n uint64) uint64 { return (n + mempage.Size - 1) &^ (mempage.Size - 1) }

// NewDriver lays out an empty ring at gpa, which is a multiple of mempage.Size.
// features are the negotiated ones.
func NewDriver(t testing.TB, mem virtio.Memory, gpa uint64, size uint16, features uint64) *Driver {
	t.Helper()
	n := uint64(size)
	d := &Driver{t: t, mem: mem, features: features, inFlight: map[uint16]bool{}}
	d.state = virtio.QueueState{Size: size, Enabled: true, Desc: gpa}
	d.state.Driver = d.state.Desc + page(n*16)
	d.state.Device = d.state.Driver + page(6+2*n)
	d.tables = d.state.Device + page(6+8*n)
	all, err := mem.Slice(gpa, RingBytes(size))
	if err != nil {
		t.Fatal(err)
	}
	clear(all)
	if features&virtio.FeatureRingPacked != 0 {
		d.ring = newPackedDriver(d)
	} else {
		d.ring = newSplitDriver(d)
	}
	return d
}

// State is the queue as the driver set it up, for [virtio.Queue.Start].
func (d *Driver) State() virtio.QueueState { return d.state }

// Start enables q, which must be fresh.
func (d *Driver) Start(q *virtio.Queue) {
	d.t.Helper()
	if err := q.Start(d.state, d.features); err != nil {
		d.t.Fatal(err)
	}
}

// Add makes a request available. It returns false if the ring is full.
func (d *Driver) Add(readable, writable []Buffer) (token uint16, ok bool) {
	d.t.Helper()
	token, ok = d.ring.add(readable, writable)
	if ok {
		if d.inFlight[token] {
			d.t.Fatalf("driver: token %d is in flight twice", token)
		}
		d.inFlight[token] = true
	}
	return token, ok
}

// Used takes the next request that the device has given back. The test fails if
// that is not in flight.
func (d *Driver) Used() (Used, bool) {
	d.t.Helper()
	u, ok := d.ring.used()
	if ok {
		if !d.inFlight[u.Token] {
			d.t.Fatalf("driver: request %d came back, and is not in flight", u.Token)
		}
		delete(d.inFlight, u.Token)
	}
	return u, ok
}

// InFlight is the number of requests that Used has not returned yet.
func (d *Driver) InFlight() int { return len(d.inFlight) }

// WantsKick reports whether the device asks for a kick for the requests added since
// the last call.
func (d *Driver) WantsKick() bool { return d.ring.wantsKick() }

// SetInterrupts asks for an interrupt for the next request that is given back, or
// for none.
func (d *Driver) SetInterrupts(on bool) { d.ring.setInterrupts(on) }

// Bytes is guest memory itself.
func (d *Driver) Bytes(gpa, n uint64) []byte {
	d.t.Helper()
	b, err := d.mem.Slice(gpa, n)
	if err != nil {
		d.t.Fatal(err)
	}
	return b
}

func (d *Driver) eventIdx() bool { return d.features&virtio.FeatureEventIdx != 0 }

// putDesc writes a descriptor of either layout.
func putDesc(b []byte, i int, addr uint64, n uint32, lo, hi uint16) {
	b = b[i*16:]
	binary.LittleEndian.PutUint64(b, addr)
	binary.LittleEndian.PutUint32(b[8:], n)
	binary.LittleEndian.PutUint16(b[12:], lo)
	binary.LittleEndian.PutUint16(b[14:], hi)
}

// fillTable writes an indirect table, for request slot i, and returns its gpa
// and length.
func (d *Driver) fillTable(i int, readable, writable []Buffer, splitFlags bool) (uint64, uint32) {
	d.t.Helper()
	n := len(readable) + len(writable)
	if n > MaxIndirect {
		d.t.Fatalf("driver: %d buffers in an indirect table", n)
	}
	gpa := d.tables + uint64(i)*MaxIndirect*16
	b := d.Bytes(gpa, uint64(n)*16)
	for j := range n {
		buf, flags := Buffer{}, uint16(0)
		if j < len(readable) {
			buf = readable[j]
		} else {
			buf, flags = writable[j-len(readable)], 2
		}
		if splitFlags {
			if j < n-1 {
				flags |= 1
			}
			putDesc(b, j, buf.GPA, buf.Len, flags, uint16(j+1))
		} else {
			putDesc(b, j, buf.GPA, buf.Len, 0, flags)
		}
	}
	return gpa, uint32(n) * 16
}

func word(b []byte, off int) *uint32 {
	return (*uint32)(unsafe.Pointer(unsafe.SliceData(b[off : off+4])))
}

func load(b []byte, off int) uint32     { return atomic.LoadUint32(word(b, off)) }
func store(b []byte, off int, v uint32) { atomic.StoreUint32(word(b, off), v) }

// load16 and store16 access half of an aligned word, the way a guest does.
func load16(b []byte, off int) uint16 {
	return uint16(load(b, off&^3) >> (8 * (off & 2)))
}

func store16(b []byte, off int, v uint16) {
	shift := 8 * (off & 2)
	p := word(b, off&^3)
	for {
		old := atomic.LoadUint32(p)
		if atomic.CompareAndSwapUint32(p, old, old&^(0xffff<<shift)|uint32(v)<<shift) {
			return
		}
	}
}
