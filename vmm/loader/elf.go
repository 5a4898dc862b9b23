package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// Constants of the ELF-64 format (System V ABI, chapters 4 and 5; gABI).
const (
	elfHeaderSize  = 64
	elfPhdrSize    = 56
	elfClass64     = 2
	elfLittle      = 1
	elfMachineX86  = 62 // EM_X86_64
	elfTypeExec    = 2
	elfTypeDyn     = 3
	segmentLoad    = 1
	segmentNote    = 4
	notePhys32     = 18 // XEN_ELFNOTE_PHYS32_ENTRY, Xen's public/elfnote.h
	maxSegments    = 256
	bzImageMagicAt = 0x202 // "HdrS", Documentation/arch/x86/boot.rst
)

// The end of every message about a file of another kind. A bzImage is parsed as ELF
// only if it is in the payload of another bzImage.
const (
	pvhELF     = "an uncompressed 64-bit x86 ELF with a PVH entry (XEN_ELFNOTE_PHYS32_ENTRY; for Linux: vmlinux, built with CONFIG_PVH)"
	needPVH    = "expected " + pvhELF
	needKernel = "expected a Linux bzImage, or " + pvhELF
)

// image is a parsed kernel file. Its data are slices of the file.
type image struct {
	segments []segment
	entry    uint64
}

// segment is a PT_LOAD entry that occupies memory.
type segment struct {
	index int    // in the program header table
	gpa   uint64 // p_paddr
	size  uint64 // p_memsz; zero bytes follow data
	data  []byte
}

// contains returns whether the address is in a segment.
func (img *image) contains(gpa uint64) bool {
	for _, s := range img.segments {
		if gpa >= s.gpa && gpa-s.gpa < s.size {
			return true
		}
	}
	return false
}

// parsePVH parses a kernel file. It allocates memory only for the segment list,
// independent of the sizes in the file.
func parsePVH(file []byte) (*image, error) {
	if err := checkHeader(file); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	phoff, phentsize, phnum := le.Uint64(file[32:]), le.Uint16(file[54:]), le.Uint16(file[56:])
	if phnum == 0 || phnum > maxSegments {
		return nil, fmt.Errorf("ELF file: number of program headers must be between 1 and %d, found %d", maxSegments, phnum)
	}
	if phentsize != elfPhdrSize {
		return nil, fmt.Errorf("ELF file: expected program headers of %d bytes, found %d", elfPhdrSize, phentsize)
	}
	table, ok := cut(file, phoff, uint64(phnum)*elfPhdrSize)
	if !ok {
		return nil, fmt.Errorf("ELF file is truncated: %d bytes, the program headers are at %#x", len(file), phoff)
	}
	img := &image{}
	found := false
	for i := range int(phnum) {
		ph := table[i*elfPhdrSize:]
		kind, offset, paddr := le.Uint32(ph), le.Uint64(ph[8:]), le.Uint64(ph[24:])
		filesz, memsz, align := le.Uint64(ph[32:]), le.Uint64(ph[40:]), le.Uint64(ph[48:])
		if kind != segmentLoad && kind != segmentNote {
			continue
		}
		data, ok := cut(file, offset, filesz)
		if !ok {
			return nil, fmt.Errorf("ELF file is truncated: %d bytes, segment %d has %#x bytes at %#x", len(file), i, filesz, offset)
		}
		switch {
		case kind == segmentNote:
			entry, ok, err := findEntry(data, align)
			if err != nil {
				return nil, err
			}
			if ok && !found {
				img.entry, found = entry, true
			}
		case filesz > memsz:
			return nil, fmt.Errorf("ELF segment %d has %#x bytes in the file and %#x in memory", i, filesz, memsz)
		case memsz > 0:
			img.segments = append(img.segments, segment{index: i, gpa: paddr, size: memsz, data: data})
		}
	}
	if !found {
		return nil, errors.New("64-bit ELF file without a PVH entry note; " + needPVH)
	}
	if len(img.segments) == 0 {
		return nil, errors.New("ELF file with a PVH entry note but without segments to load")
	}
	return img, nil
}

// checkHeader returns an error that says what a file is, unless it is a 64-bit x86
// ELF executable.
func checkHeader(file []byte) error {
	found := ""
	switch {
	case len(file) == 0:
		found = "empty file"
	case len(file) >= bzImageMagicAt+4 && string(file[bzImageMagicAt:bzImageMagicAt+4]) == "HdrS":
		return errors.New("compressed Linux kernel (bzImage); " + needPVH)
	case bytes.HasPrefix(file, []byte("\x1f\x8b")):
		found = "gzip file"
	case bytes.HasPrefix(file, []byte("MZ")):
		found = "EFI or DOS executable"
	case !bytes.HasPrefix(file, []byte("\x7fELF")):
		found = "not an ELF file"
	case len(file) < elfHeaderSize:
		found = fmt.Sprintf("ELF file truncated after %d bytes", len(file))
	case file[4] != elfClass64 && file[4] == 1:
		found = "32-bit ELF file"
	case file[4] != elfClass64:
		found = fmt.Sprintf("ELF file of unknown class %d", file[4])
	case file[5] != elfLittle:
		found = "big-endian ELF file"
	case binary.LittleEndian.Uint16(file[18:]) != elfMachineX86:
		found = fmt.Sprintf("ELF file for another processor (machine %d)", binary.LittleEndian.Uint16(file[18:]))
	case binary.LittleEndian.Uint16(file[16:]) != elfTypeExec && binary.LittleEndian.Uint16(file[16:]) != elfTypeDyn:
		found = fmt.Sprintf("ELF file that is not an executable (type %d)", binary.LittleEndian.Uint16(file[16:]))
	default:
		return nil
	}
	return errors.New(found + "; " + needKernel)
}

// findEntry finds the PVH entry in a note segment: a sequence of name size,
// descriptor size, type (4 bytes each), name and descriptor, both padded. Padding is
// to 4 bytes, or to 8 in segments with alignment 8. Linkers also set alignment 8 for
// segments that are padded to 4, so findEntry tries both.
func findEntry(notes []byte, align uint64) (entry uint64, ok bool, err error) {
	entry, ok, err = findEntryPadded(notes, 4)
	if !ok && err == nil && align == 8 {
		entry, ok, err = findEntryPadded(notes, 8)
	}
	return entry, ok, err
}

func findEntryPadded(notes []byte, pad uint64) (entry uint64, ok bool, err error) {
	const header = 12
	le := binary.LittleEndian
	for at := uint64(0); at+header <= uint64(len(notes)); {
		nameSize, descSize := uint64(le.Uint32(notes[at:])), uint64(le.Uint32(notes[at+4:]))
		kind := le.Uint32(notes[at+8:])
		name, okName := cut(notes, at+header, nameSize)
		descAt := roundUp(at+header+nameSize, pad)
		desc, okDesc := cut(notes, descAt, descSize)
		if !okName || !okDesc {
			return 0, false, nil // not a note; the entry may be in another segment
		}
		if kind == notePhys32 && string(bytes.TrimRight(name, "\x00")) == "Xen" {
			switch descSize {
			case 4:
				return uint64(le.Uint32(desc)), true, nil
			case 8:
				if entry := le.Uint64(desc); entry>>32 == 0 {
					return entry, true, nil
				}
				return 0, false, fmt.Errorf("ELF file: PVH entry must be below 4 GiB, found %#x", le.Uint64(desc))
			}
			return 0, false, fmt.Errorf("ELF file: expected a PVH entry note of 4 or 8 bytes, found %d", descSize)
		}
		at = roundUp(descAt+descSize, pad)
	}
	return 0, false, nil
}

// cut returns b[at:at+n], or false if the range is not inside b.
func cut(b []byte, at, n uint64) ([]byte, bool) {
	if n > uint64(len(b)) || at > uint64(len(b))-n {
		return nil, false
	}
	return b[at : at+n : at+n], true
}

// roundUp rounds n up to a multiple of unit, a power of two. It does not check for
// overflow.
func roundUp(n, unit uint64) uint64 { return (n + unit - 1) &^ (unit - 1) }
