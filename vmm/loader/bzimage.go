package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// The setup header of a bzImage: offsets in the file and in boot_params (Documentation/arch/x86/boot.rst).
const (
	hdrStart          = 0x1f1 // setup_sects
	hdrSysSize        = 0x1f4 // size of the code after the setup sectors, in 16 bytes
	hdrBootFlag       = 0x1fe // 0xaa55
	hdrJump           = 0x200 // the second byte is the distance to the header's end
	hdrMagic          = 0x202 // "HdrS"
	hdrVersion        = 0x206
	hdrTypeOfLoader   = 0x210
	hdrLoadFlags      = 0x211
	hdrRamdiskImage   = 0x218
	hdrRamdiskSize    = 0x21c
	hdrCmdlinePtr     = 0x228
	hdrInitrdAddrMax  = 0x22c
	hdrAlignment      = 0x230
	hdrRelocatable    = 0x234
	hdrXLoadFlags     = 0x236
	hdrCmdlineSize    = 0x238
	hdrPayloadOffset  = 0x248 // from the end of the setup sectors
	hdrPayloadLength  = 0x24c
	hdrPrefAddress    = 0x258
	hdrInitSize       = 0x260
	hdrEnd212         = 0x264 // end of the header in protocols 2.10 to 2.12
	hdrMinVersion     = 0x20c
	sectorSize        = 512
	entry64           = 0x200 // offset of the 64-bit entry in the code
	loadedHigh        = 1 << 0
	xlfKernel64       = 1 << 0
	xlfAbove4G        = 1 << 1
	maxBzImageHeader  = 0x290 // end of the header's range in boot_params
	maxKernelInitSize = 1 << 30
)

// bzImage is a parsed bzImage. Its slices are parts of the file.
type bzImage struct {
	header  []byte // the setup header, from hdrStart to its end
	code    []byte // loaded into the guest
	payload []byte // the compressed kernel in code

	prefAddress uint64
	alignment   uint64 // a power of two
	initSize    uint64 // size of the memory that the kernel needs at its load address
	initrdMax   uint64 // the highest address of the initrd
	cmdlineMax  int
	relocatable bool
	above4G     bool
}

// isBzImage returns whether the file has a Linux setup header.
func isBzImage(file []byte) bool {
	return len(file) >= hdrMagic+4 && string(file[hdrMagic:hdrMagic+4]) == "HdrS"
}

// parseBzImage parses a bzImage.
func parseBzImage(file []byte) (*bzImage, error) {
	le := binary.LittleEndian
	short := func(what string, want uint64) error {
		return fmt.Errorf("truncated: file of %d bytes, %s ends at %d", len(file), what, want)
	}
	if len(file) < hdrEnd212 {
		return nil, short("its setup header", hdrEnd212)
	}
	if flag := le.Uint16(file[hdrBootFlag:]); flag != 0xaa55 {
		return nil, fmt.Errorf("boot flag: expected 0xaa55, found %#x: not a Linux kernel, or damaged", flag)
	}
	if version := le.Uint16(file[hdrVersion:]); version < hdrMinVersion {
		return nil, fmt.Errorf("boot protocol: expected 2.12 or later (Linux 3.8, 2013), found %d.%d", version>>8, version&0xff)
	}
	if file[hdrLoadFlags]&loadedHigh == 0 {
		return nil, errors.New("expected a bzImage, found a zImage, which loads below 1 MiB")
	}
	xflags := le.Uint16(file[hdrXLoadFlags:])
	if xflags&xlfKernel64 == 0 {
		return nil, errors.New("expected a 64-bit kernel, found a 32-bit one")
	}
	headerEnd := uint64(hdrMagic) + uint64(file[hdrJump+1])
	if headerEnd < hdrEnd212 || headerEnd > maxBzImageHeader {
		return nil, fmt.Errorf("setup header must end between %#x and %#x, found %#x", hdrEnd212, maxBzImageHeader, headerEnd)
	}
	sectors := uint64(file[hdrStart])
	if sectors == 0 {
		sectors = 4
	}
	setup := (sectors + 1) * sectorSize
	// The size is rounded up to 16 bytes.
	codeSize := uint64(le.Uint32(file[hdrSysSize:])) * 16
	if headerEnd > setup || setup >= uint64(len(file)) {
		return nil, short("its setup code", setup)
	}
	code := file[setup:]
	if codeSize > uint64(len(code))+15 {
		return nil, short("its code", setup+codeSize)
	}
	code = code[:min(codeSize, uint64(len(code)))]
	if len(code) <= entry64 {
		return nil, fmt.Errorf("expected more than %d bytes of code, found %d", entry64, len(code))
	}
	payload, ok := cut(code, uint64(le.Uint32(file[hdrPayloadOffset:])), uint64(le.Uint32(file[hdrPayloadLength:])))
	if !ok {
		return nil, fmt.Errorf("payload, %d bytes at %#x, is not inside the %d bytes of code",
			le.Uint32(file[hdrPayloadLength:]), le.Uint32(file[hdrPayloadOffset:]), len(code))
	}
	b := &bzImage{
		header:      file[hdrStart:headerEnd],
		code:        code,
		payload:     payload,
		prefAddress: le.Uint64(file[hdrPrefAddress:]),
		alignment:   uint64(le.Uint32(file[hdrAlignment:])),
		initSize:    uint64(le.Uint32(file[hdrInitSize:])),
		initrdMax:   uint64(le.Uint32(file[hdrInitrdAddrMax:])),
		cmdlineMax:  int(min(le.Uint32(file[hdrCmdlineSize:]), math.MaxInt32)),
		relocatable: file[hdrRelocatable] != 0,
		above4G:     xflags&xlfAbove4G != 0,
	}
	if b.alignment == 0 || b.alignment&(b.alignment-1) != 0 {
		return nil, fmt.Errorf("alignment must be a power of two, found %#x", b.alignment)
	}
	if b.initSize < uint64(len(code)) || b.initSize > maxKernelInitSize {
		return nil, fmt.Errorf("memory size in the header must be between %d and %d bytes, found %d", len(code), maxKernelInitSize, b.initSize)
	}
	return b, nil
}

// unpack returns the kernel's payload if it is an ELF file with a PVH entry, and nil
// if the kernel has to unpack itself. size is the size of the guest's RAM.
func (b *bzImage) unpack(size uint64) ([]byte, error) {
	if len(b.payload) == 0 {
		return nil, nil
	}
	elf, err := unpack(b.payload, min(b.initSize, size))
	if errors.Is(err, errUnknownCompression) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if _, err := parsePVH(elf); err != nil {
		return nil, nil
	}
	return elf, nil
}

// loadBzImage loads a bzImage that unpacks itself.
func loadBzImage(mem Memory, b *bzImage, opt Options) (Entry, error) {
	if len(opt.Modules) > 1 {
		return Entry{}, fmt.Errorf("kernel: a bzImage has at most one module, its initrd, got %d", len(opt.Modules))
	}
	used := newPlacement(mem.Size())
	load, err := b.place(used)
	if err != nil {
		return Entry{}, fmt.Errorf("kernel: bzImage: %w", err)
	}
	entry, err := writeBootParams(mem, used, b, opt)
	if err != nil {
		return Entry{}, err
	}
	if err := mem.WriteAt(b.code, load); err != nil {
		return Entry{}, fmt.Errorf("load the kernel: %w", err)
	}
	entry.RIP = load + entry64
	return entry, nil
}

// place returns the kernel's address: its preferred one, or the lowest aligned one
// if the kernel is relocatable and that range is free.
func (b *bzImage) place(used *placement) (uint64, error) {
	const what = "the kernel"
	if used.fits(b.prefAddress, b.initSize) {
		used.insert(taken{b.prefAddress, b.prefAddress + b.initSize, what})
		return b.prefAddress, nil
	}
	if b.relocatable {
		load := roundUp(HighRAM, b.alignment)
		if used.fits(load, b.initSize) {
			used.insert(taken{load, load + b.initSize, what})
			return load, nil
		}
	}
	return 0, fmt.Errorf("needs %d MiB of RAM at %#x: the guest has %d MiB, give it more",
		(b.initSize+1<<20-1)>>20, b.prefAddress, used.size>>20)
}
