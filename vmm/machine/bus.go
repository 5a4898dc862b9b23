package machine

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// Device answers the guest's accesses to a range of ports or of guest physical
// addresses. off counts from the start of the range; p is the access's bytes,
// little endian, which lie inside the range. Calls come from the threads of
// all vCPUs at once.
type Device interface {
	// Read fills p.
	Read(off uint64, p []byte)
	// Write takes p; it does not keep it.
	Write(off uint64, p []byte)
}

// Bus routes an access to the device that claimed its address. There is one for
// ports and one for memory-mapped registers.
//
// What no device claims behaves as on a PC: it reads as all ones, and writes are
// dropped. The same holds for an access that starts in a device's range and ends
// outside of it: it is not split, since a 4-byte write to port 0xcf8 (PCI
// configuration) must not reach the reset register at 0xcf9.
type Bus struct {
	claimMu sync.Mutex // serialises changes of ranges
	ranges  atomic.Pointer[[]busRange]
}

// busRange is [first, last]; a range may end at the last address there is.
type busRange struct {
	first, last uint64
	dev         Device
}

// Claim gives the addresses [first, first+n) to a device. It fails if another
// has one of them.
func (b *Bus) Claim(first, n uint64, dev Device) error {
	b.claimMu.Lock()
	defer b.claimMu.Unlock()
	last := first + n - 1
	if n == 0 || last < first {
		return fmt.Errorf("claim %d addresses from %#x: not a range", n, first)
	}
	old := b.load()
	at, _ := slices.BinarySearchFunc(old, first, func(r busRange, a uint64) int {
		if r.last < a {
			return -1
		}
		return 1
	})
	if at < len(old) && old[at].first <= last {
		return fmt.Errorf("claim [%#x,%#x]: [%#x,%#x] is taken", first, last, old[at].first, old[at].last)
	}
	ranges := slices.Insert(slices.Clone(old), at, busRange{first, last, dev})
	b.ranges.Store(&ranges)
	return nil
}

func (b *Bus) load() []busRange {
	if r := b.ranges.Load(); r != nil {
		return *r
	}
	return nil
}

// find returns the device that has all n addresses from addr, and the offset
// in its range.
func (b *Bus) find(addr uint64, n int) (Device, uint64) {
	for _, r := range b.load() {
		if addr < r.first {
			break
		}
		if addr <= r.last {
			if uint64(n-1) > r.last-addr {
				break
			}
			return r.dev, addr - r.first
		}
	}
	return nil, 0
}

// Read lets the guest read len(p) bytes at addr.
func (b *Bus) Read(addr uint64, p []byte) {
	if dev, off := b.find(addr, len(p)); dev != nil {
		dev.Read(off, p)
		return
	}
	for i := range p {
		p[i] = 0xff
	}
}

// Write lets the guest write p at addr.
func (b *Bus) Write(addr uint64, p []byte) {
	if dev, off := b.find(addr, len(p)); dev != nil {
		dev.Write(off, p)
	}
}
