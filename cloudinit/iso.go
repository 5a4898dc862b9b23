package cloudinit

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"unicode/utf16"
)

// An ISO 9660 image (ECMA-119) of one directory. Names such as network-config do not fit its
// rules, so they are there twice more: as Rock Ridge entries (IEEE P1282), which Linux
// prefers, and as a Joliet directory, for others. The times of all files are the same, so that
// equal files make an equal image.

const (
	sector = 2048
	// Sectors of the image. The first 16 belong to the system.
	atPrimary    = 16 // volume descriptors
	atJoliet     = 17
	atTerminator = 18
	atPaths      = 19 // path tables: of the primary directory, little and big endian, and of Joliet's
	atRoot       = 23
	atJolietRoot = 24
	atFiles      = 25

	maxFiles = 8
)

// file is one of the image.
type file struct {
	name string
	data []byte
}

// writeISO makes an image.
func writeISO(label string, files []file) ([]byte, error) {
	if len(files) > maxFiles {
		return nil, fmt.Errorf("%d files: must be at most %d", len(files), maxFiles)
	}
	size := atFiles
	for _, f := range files {
		size += (len(f.data) + sector - 1) / sector
	}
	iso := make([]byte, size*sector)
	at := func(n int) []byte { return iso[n*sector : (n+1)*sector] }

	var primary, joliet bytes.Buffer
	record(&primary, "\x00", atRoot, sector, true, rockRoot)
	record(&primary, "\x01", atRoot, sector, true, rockDirectory)
	record(&joliet, "\x00", atJolietRoot, sector, true, nil)
	record(&joliet, "\x01", atJolietRoot, sector, true, nil)
	next := atFiles
	for i, f := range files {
		record(&primary, fmt.Sprintf("FILE%d.;1", i), next, len(f.data), false, rockFile(f.name))
		record(&joliet, string(ucs2(f.name)), next, len(f.data), false, nil)
		copy(iso[next*sector:], f.data)
		next += (len(f.data) + sector - 1) / sector
	}
	copy(at(atRoot), primary.Bytes())
	copy(at(atJolietRoot), joliet.Bytes())
	for i, root := range []int{atRoot, atRoot, atJolietRoot, atJolietRoot} {
		pathTable(at(atPaths+i), root, i%2 == 1)
	}
	descriptor(at(atPrimary), 1, size, atPaths, atRoot, func(s string) []byte { return []byte(s) }, ' ', label)
	descriptor(at(atJoliet), 2, size, atPaths+2, atJolietRoot, ucs2, 0, label)
	copy(at(atJoliet)[88:], "%/E") // the escape sequence of UCS-2, level 3
	copy(at(atTerminator), "\xffCD001\x01")
	return iso, nil
}

// ucs2 is a text as Joliet has it.
func ucs2(s string) (b []byte) {
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.BigEndian.AppendUint16(b, u)
	}
	return b
}

// both writes numbers in both byte orders (7.2.3, 7.3.3).
func both16(b []byte, n int) {
	binary.LittleEndian.PutUint16(b, uint16(n))
	binary.BigEndian.PutUint16(b[2:], uint16(n))
}

func both32(b []byte, n int) {
	binary.LittleEndian.PutUint32(b, uint32(n))
	binary.BigEndian.PutUint32(b[4:], uint32(n))
}

// descriptor fills a volume descriptor (8.4, 8.5).
func descriptor(b []byte, kind byte, size, paths, root int, text func(string) []byte, pad byte, label string) {
	copy(b, string(kind)+"CD001\x01")
	fill := func(from, to int, s string) {
		field := b[from:to]
		for i := range field {
			if field[i] = ' '; pad == 0 && i%2 == 0 {
				field[i] = 0
			}
		}
		copy(field, text(s))
	}
	fill(8, 40, "LINUX")
	fill(40, 72, label)
	both32(b[80:], size)
	both16(b[120:], 1) // volumes, and which of them
	both16(b[124:], 1)
	both16(b[128:], sector)
	both32(b[132:], 10) // bytes of a path table
	binary.LittleEndian.PutUint32(b[140:], uint32(paths))
	binary.BigEndian.PutUint32(b[148:], uint32(paths+1))
	var dir bytes.Buffer
	record(&dir, "\x00", root, sector, true, nil)
	copy(b[156:190], dir.Bytes())
	fill(190, 813, "")
	for i := range 4 { // times: none
		copy(b[813+17*i:], "0000000000000000\x00")
	}
	b[881] = 1
}

// pathTable fills a path table that has the root only (9.4).
func pathTable(b []byte, root int, bigEndian bool) {
	b[0] = 1
	var order binary.ByteOrder = binary.LittleEndian
	if bigEndian {
		order = binary.BigEndian
	}
	order.PutUint32(b[2:], uint32(root))
	order.PutUint16(b[6:], 1)
}

// record appends a directory record (9.1).
func record(out *bytes.Buffer, name string, at, size int, directory bool, system []byte) {
	n := 33 + len(name)
	n += n & 1
	b := make([]byte, n+len(system)+len(system)&1)
	b[0] = byte(len(b))
	both32(b[2:], at)
	both32(b[10:], size)
	copy(b[18:], []byte{126, 1, 1, 0, 0, 0, 0}) // 2026-01-01
	if directory {
		b[25] = 2
	}
	both16(b[28:], 1)
	b[32] = byte(len(name))
	copy(b[33:], name)
	copy(b[n:], system)
	out.Write(b)
}

// System use entries: SP says that there are others, ER which ones (IEEE P1281, 5.3 and
// 5.5), PX is a file's mode, and NM its name (P1282, 4.1.1 and 4.1.4).
var (
	rockDirectory = rockMode(0o040555, 2)
	rockRoot      = append(append([]byte("SP\x07\x01\xbe\xef\x00"), rockDirectory...), "ER\x12\x01\x0a\x00\x00\x01RRIP_1991A"...)
)

func rockMode(mode, links int) []byte {
	b := make([]byte, 36)
	copy(b, "PX\x24\x01")
	both32(b[4:], mode)
	both32(b[12:], links)
	return b
}

func rockFile(name string) []byte {
	b := rockMode(0o100400, 1) // there may be secrets in it
	return append(append(b, 'N', 'M', byte(5+len(name)), 1, 0), name...)
}

// readISO reads the files of an image that [writeISO] made, and of no other.
func readISO(iso []byte) ([]file, error) {
	bad := func(what string) ([]file, error) { return nil, fmt.Errorf("%w: %s", ErrNoSeed, what) }
	if len(iso) < atFiles*sector || string(iso[atPrimary*sector:][:7]) != "\x01CD001\x01" {
		return bad("no volume descriptor")
	}
	dir := iso[atRoot*sector : (atRoot+1)*sector]
	var files []file
	for i := 0; len(dir) > 33 && dir[0] != 0; i++ {
		n := int(dir[0])
		if n < 34 || n > len(dir) {
			return bad("a directory record of a length that cannot be")
		}
		r := dir[:n]
		dir = dir[n:]
		if i < 2 { // the directory itself
			continue
		}
		at, size := uint64(binary.LittleEndian.Uint32(r[2:])), uint64(binary.LittleEndian.Uint32(r[10:]))
		name, ok := rockName(r)
		if !ok || at*sector+size > uint64(len(iso)) || len(files) == maxFiles {
			return bad("a directory record that is not of govmm")
		}
		files = append(files, file{name, iso[at*sector : at*sector+size]})
	}
	return files, nil
}

// rockName returns the name in the last entry of a directory record of a file.
func rockName(r []byte) (string, bool) {
	at := 33 + int(r[32])
	at += at&1 + len(rockMode(0, 0))
	if at+5 > len(r) || string(r[at:at+2]) != "NM" {
		return "", false
	}
	end := at + int(r[at+2])
	if end < at+5 || end > len(r) {
		return "", false
	}
	return string(r[at+5 : end]), true
}
