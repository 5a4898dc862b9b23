// Package loader puts a kernel and what it wants to find at its start into
// guest memory ([Load]): an ELF file with a PVH entry, or a Linux bzImage, told
// apart by content; beside it the initrd, the command line and the memory map.
// [WriteMPTable] writes the Intel MP table that tells a kernel without ACPI its
// CPUs.
//
// PVH is the start protocol of Xen's hardware-assisted guests, which Linux,
// the BSDs and many small kernels speak and QEMU and Firecracker load too:
// https://xenbits.xen.org/docs/unstable/misc/pvh.html and Xen's
// public/arch-x86/hvm/start_info.h. The kernel starts in 32-bit protected mode
// and needs neither firmware nor a decompressor.
//
// A bzImage is unpacked here when its payload is such an ELF file; the kernel
// then starts at its link address. Otherwise, and with NoUnpack, it is started
// by the 64-bit boot protocol (Documentation/arch/x86/boot.rst in Linux) and
// unpacks itself, to a random address if it likes (KASLR).
//
// Everything here is given files and sizes that it did not make: whatever they
// hold, the outcome is a loaded guest or one error of one line.
package loader

import (
	"cmp"
	"fmt"
	"slices"

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
	// startInfoGPA is where hvm_start_info, its modules and memory map go.
	startInfoGPA = 0x6000
	// Cmdline is where the command line goes.
	Cmdline = 0x20000
	// ebda is the extended BIOS data area, where the MP floating pointer is.
	ebda = 0x9fc00
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
	Modules []Module // Linux takes the first as its initrd; a bzImage takes no other
	// RSDP is the guest physical address of ACPI's root pointer, for
	// hvm_start_info and boot_params; 0: the guest has no ACPI.
	RSDP uint64
	// Reserved are regions that the memory map has to name beside those of
	// [MemoryMap] and that are no RAM: the PCI configuration space, say.
	Reserved []Region
	// NoUnpack lets a bzImage unpack itself in the guest.
	NoUnpack bool
	// Stale says that mem may hold something already: what of an ELF file's
	// segments the file does not cover is cleared then. Fresh memory is zero
	// and stays unpopulated there. A bzImage clears its own.
	Stale bool
}

// Mode is the CPU mode in which a kernel starts.
type Mode int

// The modes.
const (
	PVH32  Mode = iota // 32-bit protected mode without paging
	Long64             // 64-bit mode, memory below 4 GiB mapped to itself
)

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
//
// Linux's 64-bit boot protocol asks for these:
//
//   - RIP, RSI = address of boot_params, and CR3, as given here; RFLAGS = 2;
//   - CR0 = PG, PE (ET may be set), CR4 = PAE, EFER = LMA, LME;
//   - CS: selector 0x10, base 0, limit 0xffffffff, type 0xb, S=1, DPL 0,
//     present, L=1, D=0, G=1;
//   - DS, ES, SS: selector 0x18, base 0, limit 0xffffffff, type 3, S=1, DPL 0,
//     present, B=1, G=1. FS and GS may be the same;
//   - GDTR: base and limit as given here, with these two segments;
//   - TR: base 0, limit 0x67, type 0xb (busy 64-bit TSS), S=0, present. LDTR is
//     unusable, IDTR undefined.
type Entry struct {
	Mode Mode
	RIP  uint64 // PVH32: below 4 GiB
	RBX  uint64 // PVH32: guest physical address of hvm_start_info, below 4 GiB

	RSI      uint64 // Long64: guest physical address of boot_params, below 4 GiB
	CR3      uint64 // Long64: guest physical address of the page tables
	GDT      uint64 // Long64: guest physical address of the GDT
	GDTLimit uint16 // Long64: its last byte's offset
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
// into hvm_start_info: RAM but for the BIOS area from 0x9fc00 to 1 MiB, and the
// addresses of interrupt controllers below 4 GiB, where KVM has pages too.
func MemoryMap(size uint64) []Region {
	low := min(size, memory.HoleStart)
	regions := []Region{
		{0, ebda, RAM},
		{ebda, HighRAM - ebda, Reserved},
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

// memoryMap returns the guest's memory map, reserved regions of its machine
// included, in the order of addresses.
func memoryMap(size uint64, reserved []Region) []Region {
	regions := append(MemoryMap(size), reserved...)
	slices.SortStableFunc(regions, func(a, b Region) int { return cmp.Compare(a.GPA, b.GPA) })
	return regions
}

// Check says, without memory at hand, what [Load] has against a kernel file; it
// does not unpack anything.
func Check(kernel []byte) error {
	var err error
	if isBzImage(kernel) {
		if _, err = parseBzImage(kernel); err != nil {
			err = fmt.Errorf("bzImage: %w", err)
		}
	} else {
		_, err = parsePVH(kernel)
	}
	if err != nil {
		return fmt.Errorf("kernel: %w", err)
	}
	return nil
}

// Load loads a kernel of either kind into mem, and beside it what it is to find.
func Load(mem Memory, kernel []byte, opt Options) (Entry, error) {
	if !isBzImage(kernel) {
		return loadPVH(mem, kernel, opt)
	}
	b, err := parseBzImage(kernel)
	if err != nil {
		return Entry{}, fmt.Errorf("kernel: bzImage: %w", err)
	}
	if !opt.NoUnpack {
		elf, err := b.unpack(mem.Size())
		switch {
		case err != nil:
			return Entry{}, fmt.Errorf("kernel: bzImage: %w", err)
		case elf != nil:
			return loadPVH(mem, elf, opt)
		}
	}
	return loadBzImage(mem, b, opt)
}

// loadPVH loads a 64-bit ELF file that has a PVH entry point into mem, and
// beside it what it is to find. Segments go to their physical addresses and
// must lie in RAM; the BIOS data area and the area from 0x9fc00 to 1 MiB are
// not theirs. Modules lie at the end of the RAM below 3 GiB.
func loadPVH(mem Memory, kernel []byte, opt Options) (Entry, error) {
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
		if opt.Stale {
			if err := clearRAM(mem, s.gpa+uint64(len(s.data)), s.gpa+s.size); err != nil {
				return Entry{}, fmt.Errorf("clear the rest of kernel segment %d: %w", s.index, err)
			}
		}
	}
	return Entry{RIP: img.entry, RBX: entry}, nil
}

// clearRAM writes zeros to [gpa, end).
func clearRAM(mem Memory, gpa, end uint64) error {
	var zeros [1 << 16]byte
	for ; gpa < end; gpa += min(uint64(len(zeros)), end-gpa) {
		if err := mem.WriteAt(zeros[:min(uint64(len(zeros)), end-gpa)], gpa); err != nil {
			return err
		}
	}
	return nil
}
