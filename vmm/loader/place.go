package loader

import (
	"fmt"
	"slices"

	"github.com/govmm/govmm/vmm/memory"
)

// placement records the guest physical addresses that are in use.
type placement struct {
	low   uint64  // end of the RAM that starts at 0
	size  uint64  // RAM in bytes
	taken []taken // in the order of their addresses
}

// taken is a range in use, and its use.
type taken struct {
	gpa, end uint64
	what     string
}

// newPlacement returns the placement of a guest before anything is loaded. Only the
// BIOS areas of a PC are in use.
func newPlacement(size uint64) *placement {
	return &placement{low: min(size, memory.HoleStart), size: size, taken: []taken{
		{biosData, biosDataEnd, "the BIOS data area"},
		{ebda, HighRAM, "the BIOS area below 1 MiB"},
	}}
}

// take reserves [gpa, gpa+n) for a segment of the kernel.
func (p *placement) take(gpa, n uint64) error {
	high := p.size - p.low
	inLow := n <= p.low && gpa <= p.low-n
	inHigh := gpa >= memory.HoleEnd && n <= high && gpa-memory.HoleEnd <= high-n
	if !inLow && !inHigh {
		return fmt.Errorf("%#x bytes at gpa %#x are outside of the guest's %d MiB of RAM: give it more memory, or another kernel", n, gpa, p.size>>20)
	}
	if by := p.overlap(gpa, gpa+n); by != nil {
		return fmt.Errorf("[%#x,%#x) overlaps %s at [%#x,%#x)", gpa, gpa+n, by.what, by.gpa, by.end)
	}
	p.insert(taken{gpa, gpa + n, "another segment"})
	return nil
}

// place reserves n free bytes below 3 GiB, at the preferred address if possible,
// otherwise as low as possible.
func (p *placement) place(n, preferred uint64, what string) (uint64, error) {
	const align = 0x1000
	if p.fits(preferred, n) {
		p.insert(taken{preferred, preferred + n, what})
		return preferred, nil
	}
	// Page 0 stays free: nothing valid should be at a null pointer.
	gpa := uint64(align)
	for {
		by := p.overlap(gpa, gpa+n)
		if by == nil {
			break
		}
		gpa = roundUp(by.end, align)
	}
	if !p.fits(gpa, n) {
		return 0, fmt.Errorf("no room for %s, %d bytes, in the guest's %d MiB of RAM beside the kernel", what, n, p.size>>20)
	}
	p.insert(taken{gpa, gpa + n, what})
	return gpa, nil
}

// placeHigh reserves n free bytes, as high as possible below 3 GiB and limit, and
// above 1 MiB.
func (p *placement) placeHigh(n, limit uint64, what string) (uint64, error) {
	const align = 0x1000
	size := roundUp(n, align)
	end := min(p.low, limit) &^ (align - 1)
	for size <= end && end-size >= HighRAM {
		by := p.overlap(end-size, end)
		if by == nil {
			p.insert(taken{end - size, end, what})
			return end - size, nil
		}
		end = by.gpa &^ (align - 1)
	}
	return 0, fmt.Errorf("no room for %s, %d bytes: the guest has %d MiB of RAM, give it more", what, n, p.size>>20)
}

// fits returns whether [gpa, gpa+n) is free RAM below 3 GiB.
func (p *placement) fits(gpa, n uint64) bool {
	return n <= p.low && gpa <= p.low-n && p.overlap(gpa, gpa+n) == nil
}

// overlap returns the highest range in use that overlaps [gpa, end), or nil.
func (p *placement) overlap(gpa, end uint64) *taken {
	for i := len(p.taken) - 1; i >= 0; i-- {
		if t := &p.taken[i]; t.gpa < end && gpa < t.end {
			return t
		}
	}
	return nil
}

func (p *placement) insert(t taken) {
	i, _ := slices.BinarySearchFunc(p.taken, t, func(a, b taken) int {
		if a.gpa < b.gpa {
			return -1
		}
		return 1
	})
	p.taken = slices.Insert(p.taken, i, t)
}
