package simtest

import (
	"bytes"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
)

// sector is the unit in which the guest writes its disks.
const sector = 512

// Disk is a simulated disk: bytes in memory, with holes where nothing was written. It
// implements [migrate.Disk] and [migrate.DiskCopy].
type Disk struct {
	number int

	mu   sync.Mutex // guards data, held
	data []byte
	held []uint64 // a bit for each sector that is not a hole

	log atomic.Pointer[[]atomic.Uint64] // of blocks that were written; nil: off
	// block is the shift of a block of the log.
	block atomic.Uint32
	// Lose makes a write vanish from the log, for tests that must notice it.
	Lose func() bool
}

func newDisk(number int, size uint64) *Disk {
	return &Disk{number: number, data: make([]byte, size), held: make([]uint64, (size/sector+63)/64)}
}

// Size implements [migrate.Disk].
func (d *Disk) Size() uint64 { return uint64(len(d.data)) }

// Number implements [migrate.DiskCopy].
func (d *Disk) Number() int { return d.number }

// StartBlockLog implements [migrate.Disk].
func (d *Disk) StartBlockLog(block uint64) error {
	if block == 0 || block&(block-1) != 0 {
		return fmt.Errorf("record blocks of %d bytes: must be a power of two", block)
	}
	words := make([]atomic.Uint64, d.Size()/block/64+1)
	d.block.Store(uint32(bits.TrailingZeros64(block)))
	d.log.Store(&words)
	return nil
}

// StopBlockLog implements [migrate.Disk].
func (d *Disk) StopBlockLog() { d.log.Store(nil) }

// FetchBlocks implements [migrate.Disk].
func (d *Disk) FetchBlocks(each func(w int, word uint64)) {
	log := d.log.Load()
	if log == nil {
		return
	}
	for w := range *log {
		if (*log)[w].Load() != 0 {
			each(w, (*log)[w].Swap(0))
		}
	}
}

// ReadBlocks implements [migrate.Disk].
func (d *Disk) ReadBlocks(p []byte, off uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if copy(p, d.data[off:]) < len(p) {
		return fmt.Errorf("read %d bytes at %d of a disk of %d", len(p), off, len(d.data))
	}
	return nil
}

// NextData implements [migrate.Disk].
func (d *Disk) NextData(off uint64) (start, end uint64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	is := func(s uint64) bool { return d.held[s/64]>>(s%64)&1 != 0 }
	all := d.Size() / sector
	s := off / sector
	for s < all && !is(s) {
		s++
	}
	e := s
	for e < all && is(e) {
		e++
	}
	return max(off, s*sector), e * sector, nil
}

// Reserve implements [migrate.DiskCopy].
func (d *Disk) Reserve(off, n uint64) error { return d.inside(off, n) }

func (d *Disk) inside(off, n uint64) error {
	if off > d.Size() || n > d.Size()-off {
		return fmt.Errorf("%d bytes at %d of a disk of %d", n, off, d.Size())
	}
	return nil
}

// Write implements [migrate.DiskCopy].
func (d *Disk) Write(p []byte, off uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.inside(off, uint64(len(p))); err != nil {
		return err
	}
	copy(d.data[off:], p)
	for s := off / sector; s < (off+uint64(len(p)))/sector; s++ {
		d.held[s/64] |= 1 << (s % 64)
	}
	return nil
}

// Zero implements [migrate.DiskCopy].
func (d *Disk) Zero(off, n uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.inside(off, n); err != nil {
		return err
	}
	clear(d.data[off : off+n])
	for s := off / sector; s < (off+n)/sector; s++ {
		d.held[s/64] &^= 1 << (s % 64)
	}
	return nil
}

// Sync implements [migrate.DiskCopy].
func (d *Disk) Sync() error { return nil }

// GuestWrite is a request of the guest's: it returns when the guest is told that it is
// done. A discard frees the sectors.
func (d *Disk) GuestWrite(p []byte, off uint64, discard bool) error {
	var err error
	if discard {
		err = d.Zero(off, uint64(len(p)))
	} else {
		err = d.Write(p, off)
	}
	if err != nil || d.Lose != nil && d.Lose() {
		return err
	}
	if log := d.log.Load(); log != nil {
		for b := off >> d.block.Load(); b <= (off+uint64(len(p))-1)>>d.block.Load(); b++ {
			(*log)[b/64].Or(1 << (b % 64))
		}
	}
	return nil
}

// Disks implements [migrate.DiskSource].
func (m *Machine) Disks() (list []migrate.Disk) {
	for _, d := range m.disks {
		list = append(list, d)
	}
	return list
}

// Disk returns a disk, for tests.
func (m *Machine) Disk(i int) *Disk { return m.disks[i] }

// DiskCopies implements [migrate.DiskTarget].
func (m *Machine) DiskCopies() (list []migrate.DiskCopy) {
	for i, d := range m.disks {
		if i >= m.sharedDisks {
			list = append(list, d)
		}
	}
	return list
}

// shareDisks takes the first disks of another machine.
func (m *Machine) shareDisks(from *Machine, n int) error {
	if n > len(m.disks) || n > len(from.disks) {
		return kind.Told(fmt.Errorf("share %d disks of %d", n, len(m.disks)))
	}
	copy(m.disks[:n], from.disks)
	m.sharedDisks = n
	return nil
}

// differs returns the first sector in which two disks differ, or holds different holes.
func (d *Disk) differs(from *Disk) error {
	if d == from {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	from.mu.Lock()
	defer from.mu.Unlock()
	for off := 0; off < len(d.data); off += sector {
		if !bytes.Equal(d.data[off:][:sector], from.data[off:][:sector]) {
			return fmt.Errorf("lost block: disk %d differs at byte %d", d.number, off)
		}
	}
	return nil
}

// writeDisk is a write of a random disk, or a discard of it.
func (v *vcpu) writeDisk() {
	disks := v.machine.disks
	d := disks[v.random.IntN(len(disks))]
	all := d.Size() / sector
	if most := v.machine.config.DiskDirty; most > 0 {
		all = min(all, most/sector)
	}
	n := min(1+v.random.Uint64N(16), all)
	p := make([]byte, n*sector)
	kind := v.random.IntN(8)
	if kind > 1 { // 0: a discard; 1: zeros
		for i := range p {
			p[i] = byte(v.random.Uint32())
		}
	}
	if err := d.GuestWrite(p, v.random.Uint64N(all-n+1)*sector, kind == 0); err != nil {
		panic(err) // of this package
	}
}
