// Package pci is one PCI bus as a guest sees it: a host bridge, functions with
// their configuration spaces, BARs and capabilities, and MSI-X.
//
// There is no firmware: [Bus.Add] places a function's BARs and turns its memory
// decoding on, so that the guest finds a machine that is set up. It may move
// BARs and size them as on any PC. There is no INTx and no I/O space.
//
// The guest reaches configuration spaces through ECAM, a range of guest
// physical addresses, and through the ports 0xcf8 and 0xcfc, which know only
// the first 256 bytes; more than those no function here has.
//
// Numbers are those of the PCI Local Bus Specification 3.0 and of the PCI
// Express Base Specification, section 7.2.2 (ECAM).
package pci

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// Where the bus is in the guest's physical address space: in the hole between
// 3 and 4 GiB, below the IOAPIC (0xfec00000).
const (
	// MMIOBase is the window of the BARs.
	MMIOBase uint64 = 0xc0000000
	MMIOSize uint64 = 0x20000000
	// ECAMBase is the memory-mapped configuration space, 1 MiB for each bus.
	ECAMBase uint64 = 0xe0000000
	ECAMSize uint64 = 1 << 20
	// ConfigPorts are the ports of configuration mechanism 1.
	ConfigPorts     uint64 = 0xcf8
	ConfigPortCount uint64 = 8

	// Slots is the number of devices on the bus; the host bridge is device 0.
	Slots = 32
)

// Region answers accesses to a range of addresses. off counts from its start;
// p is the access's bytes, little endian, all inside the range. Calls come from
// the threads of all vCPUs at once.
type Region interface {
	Read(off uint64, p []byte)
	Write(off uint64, p []byte)
}

// Bus is PCI bus 0 with its host bridge. Functions are added before the guest
// runs.
type Bus struct {
	functions [Slots]*Function
	next      uint64 // where the next BAR may go
	address   atomic.Uint32

	mapMu  sync.Mutex // serialises changes of mapped
	mapped atomic.Pointer[[]mapping]
}

// mapping is a BAR that is decoded.
type mapping struct {
	bar  *bar
	base uint64
}

// hostBridge is the function 00:00.0. The identity is the one that Red Hat
// has set aside for a generic host bridge (docs/specs/pci-ids in QEMU lists
// it); no driver binds to it, no quirk is for it.
var hostBridge = Identity{Vendor: 0x1b36, Device: 0x0008, SubVendor: 0x1af4, SubDevice: 0x1100, Class: 0x060000}

// NewBus makes a bus with its host bridge and nothing else.
func NewBus() *Bus {
	b := &Bus{next: MMIOBase}
	b.functions[0] = NewFunction(hostBridge)
	b.functions[0].bus = b
	return b
}

// Add puts a function in a slot, 1 to 31, or in the first free one if slot is
// 0, places its BARs and turns decoding on. It returns the slot.
func (b *Bus) Add(slot int, f *Function) (int, error) {
	if slot == 0 {
		for slot = 1; slot < Slots && b.functions[slot] != nil; slot++ {
		}
		if slot == Slots {
			return 0, fmt.Errorf("PCI bus: all of its %d slots are taken", Slots)
		}
	}
	if slot < 1 || slot >= Slots {
		return 0, fmt.Errorf("PCI slot %d: 1 to %d are possible", slot, Slots-1)
	}
	if b.functions[slot] != nil {
		return 0, fmt.Errorf("PCI slot %d is taken", slot)
	}
	if f.bus != nil {
		return 0, fmt.Errorf("PCI slot %d: the function is on a bus already", slot)
	}
	if err := f.place(b); err != nil {
		return 0, fmt.Errorf("PCI slot %d: %w", slot, err)
	}
	b.functions[slot] = f
	return slot, nil
}

// allocate takes size bytes, a power of 2, out of the window.
func (b *Bus) allocate(size uint64) (uint64, error) {
	align := max(size, 4096)
	base := (b.next + align - 1) &^ (align - 1)
	if base+align > MMIOBase+MMIOSize {
		return 0, fmt.Errorf("no room for a BAR of %#x bytes in the window [%#x,%#x)", size, MMIOBase, MMIOBase+MMIOSize)
	}
	b.next = base + align
	return base, nil
}

// inWindow says whether the host bridge forwards a BAR at base.
func inWindow(base, size uint64) bool {
	return base >= MMIOBase && size <= MMIOSize && base-MMIOBase <= MMIOSize-size
}

// remap replaces a BAR's mapping: a base of 0 takes it away.
func (b *Bus) remap(r *bar, base uint64) {
	b.mapMu.Lock()
	defer b.mapMu.Unlock()
	var list []mapping
	if old := b.mapped.Load(); old != nil {
		for _, m := range *old {
			if m.bar != r {
				list = append(list, m)
			}
		}
	}
	if base != 0 {
		list = append(list, mapping{r, base})
	}
	b.mapped.Store(&list)
}

// find returns the BAR that has all n bytes at addr. Where two overlap it is
// the one that came first.
func (b *Bus) find(addr uint64, n int) (*bar, uint64) {
	list := b.mapped.Load()
	if list == nil {
		return nil, 0
	}
	for _, m := range *list {
		if off := addr - m.base; addr >= m.base && off < m.bar.size {
			if uint64(n) > m.bar.size-off {
				return nil, 0
			}
			return m.bar, off
		}
	}
	return nil, 0
}

// MMIO is the window of the BARs, from MMIOBase on.
func (b *Bus) MMIO() Region { return window{b} }

type window struct{ *Bus }

func (w window) Read(off uint64, p []byte) {
	if r, at := w.find(MMIOBase+off, len(p)); r != nil {
		r.region.Read(at, p)
		return
	}
	ones(p)
}

func (w window) Write(off uint64, p []byte) {
	if r, at := w.find(MMIOBase+off, len(p)); r != nil {
		r.region.Write(at, p)
	}
}

// ones is what reading something that is not there gives.
func ones(p []byte) {
	for i := range p {
		p[i] = 0xff
	}
}
