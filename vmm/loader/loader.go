// Package loader puts a kernel and what it wants to find at its start into
// guest memory: PVH ELF files with hvm_start_info, modules and a command line
// ([LoadPVH]), and the Intel MP table that tells the guest its CPUs
// ([WriteMPTable]).
//
// PVH is the start protocol of Xen's hardware-assisted guests, which Linux,
// the BSDs and many small kernels speak and QEMU and Firecracker load too:
// https://xenbits.xen.org/docs/unstable/misc/pvh.html and Xen's
// public/arch-x86/hvm/start_info.h. The kernel starts in 32-bit protected mode
// and needs neither firmware nor a decompressor.
//
// Everything here is given files and sizes that it did not make: whatever they
// hold, the outcome is a loaded guest or one error of one line.
package loader

import (
	"fmt"

	"github.com/govmm/govmm/vmm/memory"
)

// Memory is guest memory as a loader needs it. It is fresh: what was never
// written reads as zero, and a loader leaves a kernel's bss alone so as not to
// populate it.
type Memory interface {
	// Size returns the size of the RAM in bytes; it is laid out as
	// package memory has it, around the hole from 3 to 4 GiB.
	Size() uint64
	// WriteAt writes all of p at the guest physical address, or nothing.
	WriteAt(p []byte, gpa uint64) error
}

// Where things lie in a guest of govmm, as guest physical addresses. The guest
// finds the first two in registers and in hvm_start_info; they move when the
// kernel's own segments lie there.
const (
	// StartInfo is where hvm_start_info, its modules and memory map go.
	StartInfo = 0x6000
	// Cmdline is where the command line goes.
	Cmdline = 0x20000
	// EBDA is the extended BIOS data area, where the MP floating pointer is.
	EBDA = 0x9fc00
	// HighRAM is where RAM goes on above the BIOS area.
	HighRAM = 0x100000

	biosData     = 0x400 // BIOS data area, 256 bytes
	biosDataEnd  = 0x500
	deviceWindow = 0xfec00000 // IOAPIC, local APICs, KVM's TSS and page table, to 4 GiB
)

// MaxCmdline is the longest command line in bytes. Linux on x86 keeps 2048
// with the final zero, and cuts a longer one short without a word.
const MaxCmdline = 2047

// Module is a file that the kernel finds in memory: its initrd, say.
type Module struct {
	Data    []byte
	Cmdline string // most kernels ignore it
}

// Options is what a kernel is started with. The zero value is fine.
type Options struct {
	Cmdline string
	Modules []Module // Linux takes the first as its initrd
}

// Entry is how the boot vCPU starts. PVH asks for these registers:
//
//   - RIP, and RBX = address of hvm_start_info, as given here;
//   - RFLAGS = 2: interrupts and direction flag are off. All else is undefined;
//   - CR0 = PE (ET may be set), CR4 = 0, EFER = 0: 32-bit protected mode without
//     paging. A20 is on;
//   - CS: base 0, limit 0xffffffff, 32-bit (D=1, G=1) code, type 0xb
//     (execute/read, accessed), S=1, DPL 0, present;
//   - DS, ES, SS: base 0, limit 0xffffffff, 32-bit (B=1, G=1) data, type 3
//     (read/write, accessed), S=1, DPL 0, present. FS and GS may be the same;
//   - TR: base 0, limit 0x67, type 0xb (busy 32-bit TSS), S=0, present;
//   - the selectors' values and GDTR, IDTR are undefined: the guest loads its
//     own GDT before it loads a segment register. LDTR is unusable.
type Entry struct {
	RIP uint64 // below 4 GiB
	RBX uint64 // guest physical address of hvm_start_info, below 4 GiB
}

// Region is a run of guest physical addresses in the map that a guest is given.
type Region struct {
	GPA  uint64
	Size uint64
	Type RegionType
}

// RegionType says what a region is; the numbers are those of E820.
type RegionType uint32

// The region types in use.
const (
	RAM      RegionType = 1
	Reserved RegionType = 2
)

// MemoryMap returns the map of a guest with size bytes of RAM, as it is put
// into hvm_start_info: RAM but for the BIOS area from [EBDA] to 1 MiB, and the
// addresses of interrupt controllers below 4 GiB, where KVM has pages too.
func MemoryMap(size uint64) []Region {
	low := min(size, memory.HoleStart)
	regions := []Region{
		{0, EBDA, RAM},
		{EBDA, HighRAM - EBDA, Reserved},
	}
	if low > HighRAM {
		regions = append(regions, Region{HighRAM, low - HighRAM, RAM})
	}
	regions = append(regions, Region{deviceWindow, memory.HoleEnd - deviceWindow, Reserved})
	if size > low {
		regions = append(regions, Region{memory.HoleEnd, size - low, RAM})
	}
	return regions
}

// LoadPVH loads a 64-bit ELF file that has a PVH entry point into mem, and
// beside it what it is to find. Segments go to their physical addresses and
// must lie in RAM; the BIOS data area and the area from [EBDA] to 1 MiB are
// not theirs. Modules lie at the end of the RAM below 3 GiB.
func LoadPVH(mem Memory, kernel []byte, opt Options) (Entry, error) {
	img, err := parsePVH(kernel)
	if err != nil {
		return Entry{}, fmt.Errorf("kernel: %w", err)
	}
	used := newPlacement(mem.Size())
	for _, s := range img.segments {
		if err := used.take(s.gpa, s.size); err != nil {
			return Entry{}, fmt.Errorf("kernel segment %d: %w", s.index, err)
		}
	}
	if !img.contains(img.entry) {
		return Entry{}, fmt.Errorf("kernel: its PVH entry point %#x is in none of its segments", img.entry)
	}
	entry, err := writeStartInfo(mem, used, opt)
	if err != nil {
		return Entry{}, err
	}
	for _, s := range img.segments {
		if err := mem.WriteAt(s.data, s.gpa); err != nil {
			return Entry{}, fmt.Errorf("load kernel segment %d: %w", s.index, err)
		}
	}
	return Entry{RIP: img.entry, RBX: entry}, nil
}
