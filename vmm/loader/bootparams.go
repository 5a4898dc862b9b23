package loader

import (
	"encoding/binary"
	"fmt"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/vmm/memory"
)

// boot_params, "the zero page" (Documentation/arch/x86/zero-page.rst).
const (
	bootParamsGPA  = 0x7000
	bootParamsSize = 0x1000
	bpACPIRSDP     = 0x070
	bpExtRamdisk   = 0x0c0 // upper halves of address and size of the initrd,
	bpExtSize      = 0x0c4
	bpExtCmdline   = 0x0c8 // and of the command line
	bpE820Entries  = 0x1e8
	bpE820Table    = 0x2d0
	bpE820Max      = 128
	bpE820Entry    = 20

	loaderUndefined = 0xff // type_of_loader of loaders without an assigned number
)

// The page tables and the GDT of the 64-bit entry.
const (
	pageTablesGPA = 0x9000
	mappedGiB     = 4
	largePage     = 2 << 20
	pteTable      = 1<<0 | 1<<1        // present, writable
	pteLargePage  = pteTable | 1<<7    // maps 2 MiB
	gdtGPA        = 0x8000             // null, null, code, data
	gdtCode       = 0x00af9b000000ffff // 64-bit, execute, read, accessed; at selector 0x10
	gdtData       = 0x00cf93000000ffff // read, write, accessed; at selector 0x18
)

// writeBootParams writes boot_params, the command line, the initrd, page
// tables and GDT, and returns the entry without RIP.
func writeBootParams(mem Memory, used *placement, b *bzImage, opt Options) (Entry, error) {
	if err := checkCmdline(opt.Cmdline); err != nil {
		return Entry{}, err
	}
	if len(opt.Cmdline) > b.cmdlineMax {
		return Entry{}, fmt.Errorf("command line: this kernel accepts at most %d bytes, got %d", b.cmdlineMax, len(opt.Cmdline))
	}
	regions := memoryMap(mem.Size(), opt.Reserved)
	if len(regions) > bpE820Max {
		return Entry{}, fmt.Errorf("memory map: expected at most %d regions, got %d", bpE820Max, len(regions))
	}
	entry := Entry{Mode: Long64}
	var cmdline uint64
	tables := identityTables()
	for _, w := range []struct {
		at        *uint64
		n         uint64
		preferred uint64
		what      string
	}{
		{&entry.RSI, bootParamsSize, bootParamsGPA, "boot_params"},
		{&entry.GDT, mempage.Size, gdtGPA, "the GDT"},
		{&entry.CR3, uint64(len(tables)), pageTablesGPA, "the page tables"},
		{&cmdline, uint64(len(opt.Cmdline)) + 1, cmdlineGPA, "the command line"},
	} {
		var err error
		if *w.at, err = used.place(w.n, w.preferred, w.what); err != nil {
			return Entry{}, err
		}
	}

	le := binary.LittleEndian
	page := make([]byte, bootParamsSize)
	copy(page[hdrStart:], b.header)
	page[hdrTypeOfLoader] = loaderUndefined
	putSplit := func(v uint64, low, high int) {
		le.PutUint32(page[low:], uint32(v))
		le.PutUint32(page[high:], uint32(v>>32))
	}
	putSplit(cmdline, hdrCmdlinePtr, bpExtCmdline)
	le.PutUint64(page[bpACPIRSDP:], opt.RSDP)
	page[bpE820Entries] = byte(len(regions))
	for i, r := range regions {
		e := page[bpE820Table+i*bpE820Entry:]
		le.PutUint64(e[0:], r.GPA)
		le.PutUint64(e[8:], r.Size)
		le.PutUint32(e[16:], uint32(r.Type))
	}
	if len(opt.Modules) > 0 && len(opt.Modules[0].Data) > 0 {
		initrd := opt.Modules[0].Data
		gpa, err := b.placeInitrd(used, uint64(len(initrd)))
		if err != nil {
			return Entry{}, err
		}
		if err := mem.WriteAt(initrd, gpa); err != nil {
			return Entry{}, fmt.Errorf("load the initrd: %w", err)
		}
		putSplit(gpa, hdrRamdiskImage, bpExtRamdisk)
		putSplit(uint64(len(initrd)), hdrRamdiskSize, bpExtSize)
	}

	gdt := make([]byte, 4*8)
	le.PutUint64(gdt[0x10:], gdtCode)
	le.PutUint64(gdt[0x18:], gdtData)
	entry.GDTLimit = uint16(len(gdt) - 1)
	relocate(tables, entry.CR3)
	for _, w := range []struct {
		p    []byte
		gpa  uint64
		what string
	}{
		{[]byte(opt.Cmdline + "\x00"), cmdline, "the command line"},
		{gdt, entry.GDT, "the GDT"},
		{tables, entry.CR3, "the page tables"},
		{page, entry.RSI, "boot_params"},
	} {
		if err := mem.WriteAt(w.p, w.gpa); err != nil {
			return Entry{}, fmt.Errorf("write %s: %w", w.what, err)
		}
	}
	return entry, nil
}

// placeInitrd returns the initrd's address: as high as the kernel allows below 3
// GiB, otherwise above 4 GiB if the kernel supports that.
func (b *bzImage) placeInitrd(used *placement, n uint64) (uint64, error) {
	gpa, err := used.placeHigh(n, b.initrdMax+1, "the initrd")
	if err != nil && b.above4G && used.size-used.low >= roundUp(n, mempage.Size) {
		return memory.HoleEnd + (used.size-used.low-n)&^(mempage.Size-1), nil
	}
	return gpa, err
}

// identityTables returns page tables that map the first 4 GiB to the same physical
// addresses: a PML4, a page directory pointer table, and a page directory of 2 MiB
// pages for each GiB. They are valid at address 0, see relocate.
func identityTables() []byte {
	le := binary.LittleEndian
	t := make([]byte, (2+mappedGiB)*mempage.Size)
	le.PutUint64(t, mempage.Size|pteTable)
	for gib := range uint64(mappedGiB) {
		directory := (2 + gib) * mempage.Size
		le.PutUint64(t[mempage.Size+gib*8:], directory|pteTable)
		for i := range uint64(512) {
			le.PutUint64(t[directory+i*8:], gib<<30+i*largePage|pteLargePage)
		}
	}
	return t
}

// relocate adjusts the addresses in the tables for tables at gpa.
func relocate(tables []byte, gpa uint64) {
	le := binary.LittleEndian
	le.PutUint64(tables, le.Uint64(tables)+gpa)
	for gib := range mappedGiB {
		e := tables[mempage.Size+gib*8:]
		le.PutUint64(e, le.Uint64(e)+gpa)
	}
}
