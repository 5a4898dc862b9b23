package pci

import (
	"encoding/binary"
	"fmt"
)

const (
	barCount = 6
	barWide  = 1 << 2 // memory, 64 bits
	barFlags = 0xf    // the bits that are not part of the address
)

// BAR is a range of memory-mapped registers of a function.
type BAR struct {
	// Size is a power of 2, at least 16.
	Size uint64
	// Wide makes it a 64-bit BAR, which also occupies the next index.
	Wide bool
	// Region handles the guest's accesses.
	Region Region
	// Moved, which may be nil, is called when the BAR is mapped at a guest
	// physical address and when it is unmapped, so that what is registered in
	// the kernel for the address (an ioeventfd) can follow.
	Moved func(base uint64, there bool)
}

type bar struct {
	index  int
	size   uint64
	wide   bool
	region Region
	moved  func(uint64, bool)
	base   uint64 // where it is mapped; 0: nowhere
}

// AddBAR adds BAR index, 0 to 5.
func (f *Function) AddBAR(index int, b BAR) error {
	places := 1
	if b.Wide {
		places = 2
	}
	if index < 0 || index+places > barCount {
		return fmt.Errorf("PCI BAR %d: index must be between 0 and %d", index, barCount-places)
	}
	if b.Region == nil {
		return fmt.Errorf("PCI BAR %d has no region", index)
	}
	if b.Size < 16 || b.Size&(b.Size-1) != 0 || b.Size > MMIOSize {
		return fmt.Errorf("PCI BAR %d: size must be a power of 2 between 16 and %#[3]x, got %#[2]x", index, b.Size, MMIOSize)
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
			return fmt.Errorf("PCI BAR %d overlaps BAR %d", index, other.index)
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

// place assigns addresses to the BARs and enables memory decoding, as firmware
// does.
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
	flags := uint32(f.config[reg] & barFlags)
	binary.LittleEndian.PutUint32(f.config[reg:], uint32(base)|flags)
	if r.wide {
		binary.LittleEndian.PutUint32(f.config[reg+4:], uint32(base>>32))
	}
}

// address returns the address in the BAR's register, or 0 if the BAR is not
// mapped: memory decoding is off, or the host bridge does not forward the address.
func (f *Function) address(r *bar) uint64 {
	if binary.LittleEndian.Uint16(f.config[regCommand:])&commandMemory == 0 {
		return 0
	}
	reg := regBAR + 4*r.index
	base := uint64(binary.LittleEndian.Uint32(f.config[reg:]) &^ barFlags)
	if r.wide {
		base |= uint64(binary.LittleEndian.Uint32(f.config[reg+4:])) << 32
	}
	if !inWindow(base, r.size) {
		return 0
	}
	return base
}

// decode maps all BARs as the configuration space says. The caller holds space.
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

// AccessBAR reads or writes p at offset off of a BAR like a guest access,
// independent of where the BAR is mapped. It returns whether the BAR has these
// bytes.
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
