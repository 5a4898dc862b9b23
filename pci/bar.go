package pci

import (
	"encoding/binary"
	"fmt"
)

const (
	barCount  = 6
	barWide   = 1 << 2 // memory, 64 bits
	barNature = 0xf    // the bits that are no address
)

// BAR is a range of memory-mapped registers of a function.
type BAR struct {
	// Size is a power of 2, at least 16.
	Size uint64
	// Wide makes it a 64-bit BAR, which takes the next one's place too.
	Wide bool
	// Region answers the guest's accesses.
	Region Region
	// Moved, which may be nil, is told when the BAR appears at a guest physical
	// address and when it leaves one, so that what the kernel knows of the
	// address (an ioeventfd) can follow.
	Moved func(base uint64, there bool)
}

type bar struct {
	index  int
	size   uint64
	wide   bool
	region Region
	moved  func(uint64, bool)
	base   uint64 // where it is decoded; 0: nowhere
}

// AddBAR adds BAR index, 0 to 5.
func (f *Function) AddBAR(index int, b BAR) error {
	places := 1
	if b.Wide {
		places = 2
	}
	if index < 0 || index+places > barCount || b.Region == nil {
		return fmt.Errorf("PCI BAR %d: not possible", index)
	}
	if b.Size < 16 || b.Size&(b.Size-1) != 0 || b.Size > MMIOSize {
		return fmt.Errorf("PCI BAR %d of %#x bytes: a power of 2 from 16 to %#x is possible", index, b.Size, MMIOSize)
	}
	for _, other := range f.bars {
		if other == nil {
			continue
		}
		end := other.index + 1
		if other.wide {
			end++
		}
		if index < end && other.index < index+places {
			return fmt.Errorf("PCI BAR %d: taken by BAR %d", index, other.index)
		}
	}
	f.bars[index] = &bar{index: index, size: b.Size, wide: b.Wide, region: b.Region, moved: b.Moved}
	reg := regBAR + 4*index
	mask := ^(b.Size - 1)
	binary.LittleEndian.PutUint32(f.writable[reg:], uint32(mask))
	if b.Wide {
		f.config[reg] = barWide
		binary.LittleEndian.PutUint32(f.writable[reg+4:], uint32(mask>>32))
	}
	return nil
}

// place gives the BARs their first addresses and turns decoding on, as firmware
// would.
func (f *Function) place(b *Bus) error {
	f.space.Lock()
	defer f.space.Unlock()
	for _, r := range f.bars {
		if r == nil {
			continue
		}
		base, err := b.allocate(r.size)
		if err != nil {
			return err
		}
		f.setBAR(r, base)
	}
	f.bus = b
	f.config[regCommand] |= commandMemory
	f.decode()
	return nil
}

func (f *Function) setBAR(r *bar, base uint64) {
	reg := regBAR + 4*r.index
	nature := uint32(f.config[reg] & barNature)
	binary.LittleEndian.PutUint32(f.config[reg:], uint32(base)|nature)
	if r.wide {
		binary.LittleEndian.PutUint32(f.config[reg+4:], uint32(base>>32))
	}
}

// address is where the guest wants the BAR, 0 for nowhere: decoding is off, or
// the host bridge forwards nothing there.
func (f *Function) address(r *bar) uint64 {
	if binary.LittleEndian.Uint16(f.config[regCommand:])&commandMemory == 0 {
		return 0
	}
	reg := regBAR + 4*r.index
	base := uint64(binary.LittleEndian.Uint32(f.config[reg:]) &^ barNature)
	if r.wide {
		base |= uint64(binary.LittleEndian.Uint32(f.config[reg+4:])) << 32
	}
	if !inWindow(base, r.size) {
		return 0
	}
	return base
}

// decode makes the mapping of all BARs follow the configuration space. The
// caller holds the lock.
func (f *Function) decode() {
	if f.bus == nil {
		return
	}
	for _, r := range f.bars {
		if r == nil {
			continue
		}
		base := f.address(r)
		if base == r.base {
			continue
		}
		if r.base != 0 && r.moved != nil {
			r.moved(r.base, false)
		}
		r.base = base
		f.bus.remap(r, base)
		if base != 0 && r.moved != nil {
			r.moved(base, true)
		}
	}
}

// AccessBAR reads or writes p at off of a BAR as the guest would through the
// address space, wherever the BAR is. It says whether the BAR has those bytes.
func (f *Function) AccessBAR(index int, off uint64, p []byte, write bool) bool {
	if index < 0 || index >= barCount || f.bars[index] == nil {
		return false
	}
	r := f.bars[index]
	if off > r.size || uint64(len(p)) > r.size-off {
		return false
	}
	if write {
		r.region.Write(off, p)
	} else {
		r.region.Read(off, p)
	}
	return true
}
