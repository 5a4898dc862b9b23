// Package pci emulates one PCI bus: a host bridge, functions with their
// configuration spaces, BARs and capabilities, and MSI-X.
//
// There is no firmware: [Bus.Add] assigns addresses to a function's BARs and
// enables its memory decoding. The guest may move and size BARs as on any PC.
// There are no INTx interrupts and no I/O BARs.
//
// The guest accesses configuration spaces through ECAM, a range of guest physical
// addresses, and through the ports 0xcf8 and 0xcfc, which reach the first 256
// bytes. No function has more than these.
//
// Numbers are those of the PCI Local Bus Specification 3.0 and of the PCI
// Express Base Specification, section 7.2.2 (ECAM).
package pci

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
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

// Region handles accesses to a range of addresses. off is the offset in the range;
// p has the bytes of the access, little endian, all inside the range. The threads
// of all vCPUs may call it at once.
type Region interface {
	Read(off uint64, p []byte)
	Write(off uint64, p []byte)
}

// Bus is PCI bus 0 with its host bridge. Functions are added before the guest
// runs.
type Bus struct {
	functions [Slots]*Function
	next      uint64 // the lowest free address for a BAR
	address   atomic.Uint32

	mapMu  sync.Mutex // held while mapped is replaced
	mapped atomic.Pointer[[]mapping]
}

// mapping is a BAR at the address where it is mapped.
type mapping struct {
	bar  *bar
	base uint64
}

// hostBridge is the function 00:00.0. Red Hat has assigned this identity to a
// generic host bridge (docs/specs/pci-ids in QEMU). Guests have no driver and no
// quirk for it.
var hostBridge = Identity{Vendor: 0x1b36, Device: 0x0008, SubVendor: 0x1af4, SubDevice: 0x1100, Class: 0x060000}

// NewBus returns a bus with only its host bridge.
func NewBus() *Bus {
	b := &Bus{next: MMIOBase}
	b.functions[0] = NewFunction(hostBridge)
	b.functions[0].bus = b
	return b
}

// Add puts a function in a slot, 1 to 31, or in the first free one if slot is
// 0. It assigns addresses to the BARs, enables memory decoding, and returns the
// slot.
func (b *Bus) Add(slot int, f *Function) (int, error) {
	if slot == 0 {
		for slot = 1; slot < Slots && b.functions[slot] != nil; slot++ {
		}
		if slot == Slots {
			return 0, fmt.Errorf("PCI bus: all %d slots are in use", Slots)
		}
	}
	if slot < 1 || slot >= Slots {
		return 0, fmt.Errorf("PCI slot must be between 1 and %[2]d, got %[1]d", slot, Slots-1)
	}
	if b.functions[slot] != nil {
		return 0, fmt.Errorf("PCI slot %d is in use", slot)
	}
	if f.bus != nil {
		return 0, fmt.Errorf("PCI slot %d: the function is already on a bus", slot)
	}
	if err := f.place(b); err != nil {
		return 0, fmt.Errorf("PCI slot %d: %w", slot, err)
	}
	b.functions[slot] = f
	return slot, nil
}

// allocate returns the address of size free bytes, a power of 2, in the window.
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

// remap replaces a BAR's mapping; a base of 0 removes it.
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

// find returns the BAR that has all n bytes at addr. If two overlap, the one that
// was mapped first wins.
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

// SlotAt returns the slot of the function with a BAR at addr. It waits for nobody.
func (b *Bus) SlotAt(addr uint64) (slot int, ok bool) {
	r, _ := b.find(addr, 1)
	for slot, f := range b.functions {
		if f != nil && r != nil && slices.Contains(f.bars[:], r) {
			return slot, true
		}
	}
	return 0, false
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

// ones is the result of reading an address without a device.
func ones(p []byte) {
	for i := range p {
		p[i] = 0xff
	}
}
