package loader

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// Layout of hvm_start_info version 1 (Xen's public/arch-x86/hvm/start_info.h).
const (
	startInfoMagic   = 0x336ec578 // "xEn3" with the top bit of the E set
	startInfoVersion = 1          // the first with a memory map
	startInfoSize    = 56
	modlistEntrySize = 32
	memmapEntrySize  = 24

	maxModules = 64
)

// writeStartInfo writes hvm_start_info, the memory map, the module list, the
// modules and the command lines, and returns hvm_start_info's address.
func writeStartInfo(mem Memory, used *placement, opt Options) (uint64, error) {
	if err := checkCmdline(opt.Cmdline); err != nil {
		return 0, err
	}
	if len(opt.Modules) > maxModules {
		return 0, fmt.Errorf("expected at most %d modules, got %d", maxModules, len(opt.Modules))
	}
	regions := memoryMap(mem.Size(), opt.Reserved)
	memmapAt := uint64(startInfoSize)
	modlistAt := memmapAt + uint64(len(regions))*memmapEntrySize
	size := modlistAt + uint64(len(opt.Modules))*modlistEntrySize

	// text is all command lines: the kernel's and those of the modules.
	text := []byte(opt.Cmdline + "\x00")
	moduleText := make([]uint64, len(opt.Modules))
	for i, m := range opt.Modules {
		if err := checkCmdline(m.Cmdline); err != nil {
			return 0, fmt.Errorf("module %d: %w", i, err)
		}
		moduleText[i] = uint64(len(text))
		text = append(text, m.Cmdline+"\x00"...)
	}

	infoGPA, err := used.place(size, startInfoGPA, "hvm_start_info")
	if err != nil {
		return 0, err
	}
	textGPA, err := used.place(uint64(len(text)), cmdlineGPA, "the command line")
	if err != nil {
		return 0, err
	}

	le := binary.LittleEndian
	info := make([]byte, size)
	le.PutUint32(info[0:], startInfoMagic)
	le.PutUint32(info[4:], startInfoVersion)
	le.PutUint32(info[12:], uint32(len(opt.Modules)))
	if len(opt.Modules) > 0 {
		le.PutUint64(info[16:], infoGPA+modlistAt)
	}
	le.PutUint64(info[24:], textGPA)
	le.PutUint64(info[32:], opt.RSDP)
	le.PutUint64(info[40:], infoGPA+memmapAt)
	le.PutUint32(info[48:], uint32(len(regions)))
	for i, r := range regions {
		e := info[memmapAt+uint64(i)*memmapEntrySize:]
		le.PutUint64(e[0:], r.GPA)
		le.PutUint64(e[8:], r.Size)
		le.PutUint32(e[16:], uint32(r.Type))
	}
	for i, m := range opt.Modules {
		gpa, err := used.placeHigh(uint64(len(m.Data)), used.low, fmt.Sprintf("module %d", i))
		if err != nil {
			return 0, err
		}
		if err := mem.WriteAt(m.Data, gpa); err != nil {
			return 0, fmt.Errorf("load module %d: %w", i, err)
		}
		e := info[modlistAt+uint64(i)*modlistEntrySize:]
		le.PutUint64(e[0:], gpa)
		le.PutUint64(e[8:], uint64(len(m.Data)))
		le.PutUint64(e[16:], textGPA+moduleText[i])
	}
	if err := mem.WriteAt(text, textGPA); err != nil {
		return 0, fmt.Errorf("write the command line: %w", err)
	}
	if err := mem.WriteAt(info, infoGPA); err != nil {
		return 0, fmt.Errorf("write hvm_start_info: %w", err)
	}
	return infoGPA, nil
}

// checkCmdline returns an error if a guest could not read the whole command line.
func checkCmdline(s string) error {
	if len(s) > MaxCmdline {
		return fmt.Errorf("command line: expected at most %d bytes, got %d", MaxCmdline, len(s))
	}
	if i := strings.IndexByte(s, 0); i >= 0 {
		return fmt.Errorf("command line has a zero byte at %d, which would end it", i)
	}
	return nil
}
