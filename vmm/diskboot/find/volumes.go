package find

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// magics are how file systems begin, those that are read and others.
var magics = []struct {
	kind  string
	off   int64
	magic string
}{
	{"ext4", 1024 + sbMagic, "\x53\xef"},
	{"squashfs", 0, "hsqs"},
	{"iso9660", 0x8001, "CD001"},
	{"xfs", 0, "XFSB"},
	{"btrfs", 0x10040, "_BHRfS_M"},
	{"f2fs", 1024, "\x10\x20\xf5\xf2"},
	{"erofs", 1024, "\xe2\xe1\xf5\xe0"},
	{"bcachefs", 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca"},
	{"NTFS", 3, "NTFS    "},
	{"exFAT", 3, "EXFAT   "},
	{"LUKS (encrypted)", 0, "LUKS\xba\xbe"},
	{"LVM", 512, "LABELONE"},
	{"LVM", 0, "LABELONE"},
	{"swap", 4096 - 10, "SWAPSPACE2"},
	{"Linux RAID", 4096, "\xfc\x4e\x2b\xa9"},
	{"ZFS", 0x4000, "\x0c\xb1\xba\x00\x00\x00\x00\x00"},
}

// kindOf says which file system is in a range; "": none that is known.
func kindOf(r io.ReaderAt, size int64) string {
	for _, m := range magics {
		b := make([]byte, len(m.magic))
		if m.off+int64(len(b)) <= size && readFull(r, b, m.off) == nil && string(b) == m.magic {
			return m.kind
		}
	}
	if _, err := fatBits(r); err == nil {
		return "vfat"
	}
	return ""
}

// fileSystemHere says whether the disk is a file system, although its first sector may end
// as a partition table does.
func fileSystemHere(r io.ReaderAt, size int64) bool {
	switch kind := kindOf(r, size); kind {
	case "":
		return false
	case "vfat", "ext4", "squashfs":
		return true
	case "iso9660": // of a hybrid the table has the partitions, which are parts of it
		return true
	default:
		return kind != "LVM"
	}
}

// maxFAT bounds the table of a FAT in bytes, since all of it is kept.
const maxFAT = 32 << 20

// fatBits checks the boot sector of a FAT and returns its width (Microsoft's specification
// of FAT, "FAT type determination").
func fatBits(r io.ReaderAt) (int, error) {
	b := make([]byte, 512)
	if err := readFull(r, b, 0); err != nil {
		return 0, err
	}
	le := binary.LittleEndian
	sector, cluster, reserved, fats := uint32(le.Uint16(b[11:])), uint32(b[13]), uint32(le.Uint16(b[14:])), uint32(b[16])
	if b[510] != 0x55 || b[511] != 0xaa || b[0] != 0xeb && b[0] != 0xe9 ||
		sector < 512 || sector > 4096 || sector&(sector-1) != 0 || cluster == 0 || cluster&(cluster-1) != 0 || reserved == 0 || fats == 0 || fats > 2 {
		return 0, errors.New("no boot sector of a FAT")
	}
	rootEntries, sectors, perFAT := uint32(le.Uint16(b[17:])), uint32(le.Uint16(b[19:])), uint32(le.Uint16(b[22:]))
	if sectors == 0 {
		sectors = le.Uint32(b[32:])
	}
	if perFAT == 0 {
		perFAT = le.Uint32(b[36:])
	}
	system := uint64(reserved) + uint64(fats)*uint64(perFAT) + uint64((rootEntries*32+sector-1)/sector)
	if perFAT == 0 || system >= uint64(sectors) || uint64(perFAT)*uint64(sector) > maxFAT {
		return 0, errors.New("no boot sector of a FAT")
	}
	switch clusters := (uint64(sectors) - system) / uint64(cluster); {
	case clusters < 4085:
		return 12, nil
	case clusters < 65525:
		return 16, nil
	}
	return 32, nil
}

// fatName is the serial number and the label of a FAT's boot sector.
func fatName(r io.ReaderAt) (uuid, label string) {
	b := make([]byte, 512)
	bits, err := fatBits(r)
	if err != nil || readFull(r, b, 0) != nil {
		return "", ""
	}
	at := 39
	if bits == 32 {
		at = 67
	}
	n := binary.LittleEndian.Uint32(b[at:])
	return fmt.Sprintf("%04X-%04X", n>>16, n&0xffff), strings.TrimRight(cString(b[at+4:at+15]), " ")
}

// isoUUID is the time at which an ISO 9660 was made, as GRUB and blkid write it.
func isoUUID(r io.ReaderAt) string {
	b := make([]byte, 2048)
	if readFull(r, b, 0x8000) != nil {
		return ""
	}
	t := b[830:846] // modified
	if bytes.HasPrefix(t, []byte("0000")) || t[0] == 0 {
		t = b[813:829] // created
	}
	for _, c := range t {
		if c < '0' || c > '9' {
			return ""
		}
	}
	return fmt.Sprintf("%s-%s-%s-%s-%s-%s-%s", t[:4], t[4:6], t[6:8], t[8:10], t[10:12], t[12:14], t[14:16])
}

// openVolume opens the file system of a partition. ok is false if there is none that is
// read; why says what is there instead.
func openVolume(d io.ReaderAt, p partition) (v *volume, why string) {
	r := &part{d, p.start, p.size}
	v = &volume{partition: p, kind: kindOf(r, p.size)}
	var err error
	switch v.kind {
	case "ext4":
		var e *ext4
		e, v.uuid, v.label, err = openExt4(r, p.size)
		v.fileSystem = e
	case "vfat":
		var g *goDiskFS
		g, err = openFAT(r, p.size)
		v.fileSystem = g
		v.uuid, v.label = fatName(r)
	case "squashfs":
		v.fileSystem, err = openSquashfs(r, p.size)
	case "iso9660":
		var g *goDiskFS
		if g, err = openISO(r, p.size); err == nil {
			err = guarded(func() error {
				v.label = strings.TrimRight(g.Label(), " \x00")
				return nil
			})
		}
		v.fileSystem = g
		v.uuid = isoUUID(r)
	case "":
		return nil, "no file system that is known"
	default:
		return nil, v.kind + ", which is not read"
	}
	if err != nil {
		return nil, fmt.Sprintf("%s: %v", v.kind, err)
	}
	return v, ""
}
