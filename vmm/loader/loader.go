// Package loader loads a kernel into guest memory ([Load]): an ELF file with a PVH
// entry or a Linux bzImage, recognised by content, with its initrd, command line and
// memory map. [WriteMPTable] writes the Intel MP table, which describes the CPUs to
// a kernel without ACPI.
//
// PVH is the boot protocol of Xen's hardware-assisted guests. Linux, the BSDs and
// many small kernels support it, and QEMU and Firecracker load it too:
// https://xenbits.xen.org/docs/unstable/misc/pvh.html and Xen's
// public/arch-x86/hvm/start_info.h. The kernel starts in 32-bit protected mode and
// needs neither firmware nor a decompressor.
//
// A bzImage starts by the 64-bit boot protocol (Documentation/arch/x86/boot.rst in
// Linux) and unpacks itself in the guest, to a random address with KASLR. If its
// payload is an ELF file with a PVH entry, [Unpack] returns that file, which starts
// faster, at its link address.
//
// Files and sizes are untrusted input: the result is a loaded guest or an error of
// one line. Decompressors are complex code, so only Unpack runs them, and Load does
// not: a caller need not unpack the file of an untrusted peer.
package loader

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/govmm/govmm/vmm/memory"
)

// Memory is guest memory. It must read as zero where it was never written: the
// loader does not write a kernel's BSS, so that it stays unpopulated (but see
// Options.Stale).
type Memory interface {
	// Size returns the size of the RAM in bytes. Its layout is that of package
	// memory, with the hole between 3 and 4 GiB.
	Size() uint64
	// WriteAt writes all of p at the guest physical address, or nothing.
	WriteAt(p []byte, gpa uint64) error
}

// Guest physical addresses. The first two are preferred addresses: the loader
// chooses others if the kernel's segments are there. The guest gets them in a
// register and in hvm_start_info.
const (
	// startInfoGPA is the address of hvm_start_info, its modules and memory map.
	startInfoGPA = 0x6000
	cmdlineGPA   = 0x20000
	// ebda is the extended BIOS data area, which has the MP floating pointer.
	ebda = 0x9fc00
	// HighRAM is the start of the RAM above the BIOS area.
	HighRAM = 0x100000

	biosData     = 0x400 // BIOS data area, 256 bytes
	biosDataEnd  = 0x500
	deviceWindow = 0xfec00000 // IOAPIC, local APICs, KVM's TSS and page table, to 4 GiB
)

// MaxCmdline is the longest command line in bytes. Linux on x86 silently truncates
// one that is longer than 2048 bytes with its final zero.
const MaxCmdline = 2047

// Module is a file that is loaded with the kernel, such as its initrd.
type Module struct {
	Data    []byte
	Cmdline string // most kernels ignore it
}

// Options are options of [Load]. The zero value is valid.
type Options struct {
	Cmdline string
	Modules []Module // for Linux the first is the initrd; a bzImage has at most one
	// RSDP is the guest physical address of ACPI's root pointer, for
	// hvm_start_info and boot_params; 0: the guest has no ACPI.
	RSDP uint64
	// Reserved are further regions of the memory map that are not RAM, such as
	// the PCI configuration space.
	Reserved []Region
	// Stale says that memory may not be zero. The loader then clears the BSS of
	// an ELF file. A bzImage clears its own.
	Stale bool
}

// Mode is the CPU mode in which a kernel starts.
type Mode int

// The modes.
const (
	PVH32  Mode = iota // 32-bit protected mode without paging
	Long64             // 64-bit mode, memory below 4 GiB mapped to itself
)

// Entry is the initial state of the boot vCPU. PVH requires these registers:
//
//   - RIP, and RBX = address of hvm_start_info, as in Entry;
//   - RFLAGS = 2: interrupts and direction flag are off. Other registers are
//     undefined;
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
// Linux's 64-bit boot protocol requires these:
//
//   - RIP, RSI = address of boot_params, and CR3, as in Entry; RFLAGS = 2;
//   - CR0 = PG, PE (ET may be set), CR4 = PAE, EFER = LMA, LME;
//   - CS: selector 0x10, base 0, limit 0xffffffff, type 0xb, S=1, DPL 0,
//     present, L=1, D=0, G=1;
//   - DS, ES, SS: selector 0x18, base 0, limit 0xffffffff, type 3, S=1, DPL 0,
//     present, B=1, G=1. FS and GS may be the same;
//   - GDTR: base and limit as in Entry; the table has these two segments;
//   - TR: base 0, limit 0x67, type 0xb (busy 64-bit TSS), S=0, present. LDTR is
//     unusable, IDTR undefined.
type Entry struct {
	Mode Mode
	RIP  uint64 // PVH32: below 4 GiB
	RBX  uint64 // PVH32: guest physical address of hvm_start_info, below 4 GiB

	RSI      uint64 // Long64: guest physical address of boot_params, below 4 GiB
	CR3      uint64 // Long64: guest physical address of the page tables
	GDT      uint64 // Long64: guest physical address of the GDT
	GDTLimit uint16 // Long64: offset of the GDT's last byte
}

// Region is a range of guest physical addresses in the guest's memory map.
type Region struct {
	GPA  uint64
	Size uint64
	Type RegionType
}

// RegionType is the type of a region, an E820 number.
type RegionType uint32

// The region types in use.
const (
	RAM      RegionType = 1
	Reserved RegionType = 2
)

// memoryMap returns the memory map of a guest with size bytes of RAM, in the order
// of addresses: RAM without the BIOS area from 0x9fc00 to 1 MiB; the addresses below
// 4 GiB of the interrupt controllers and of KVM's pages; and the machine's reserved
// regions.
func memoryMap(size uint64, reserved []Region) []Region {
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
	regions = append(regions, reserved...)
	slices.SortStableFunc(regions, func(a, b Region) int { return cmp.Compare(a.GPA, b.GPA) })
	return regions
}

// Check returns the errors of [Load] that depend only on the kernel file. It does
// not unpack anything.
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

// Unpack returns the payload of a bzImage if it is an ELF file with a PVH entry, and
// every other kernel unchanged. size is the size of the guest's RAM in bytes; the
// payload must not be larger.
func Unpack(kernel []byte, size uint64) ([]byte, error) {
	if !isBzImage(kernel) {
		return kernel, nil
	}
	b, err := parseBzImage(kernel)
	if err != nil {
		return nil, fmt.Errorf("kernel: bzImage: %w", err)
	}
	elf, err := b.unpack(size)
	if err != nil {
		return nil, fmt.Errorf("kernel: bzImage: %w", err)
	}
	if elf == nil {
		return kernel, nil
	}
	return elf, nil
}

// Load loads a kernel of either kind into mem, with what opt describes.
func Load(mem Memory, kernel []byte, opt Options) (Entry, error) {
	if !isBzImage(kernel) {
		return loadPVH(mem, kernel, opt)
	}
	b, err := parseBzImage(kernel)
	if err != nil {
		return Entry{}, fmt.Errorf("kernel: bzImage: %w", err)
	}
	return loadBzImage(mem, b, opt)
}

// loadPVH loads a 64-bit ELF file with a PVH entry point into mem. Segments are
// loaded at their physical addresses, which must be RAM and not overlap the BIOS data
// area or the area from 0x9fc00 to 1 MiB. Modules are at the end of the RAM below 3
// GiB.
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
		return Entry{}, fmt.Errorf("kernel: PVH entry point %#x is outside of all segments", img.entry)
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
