package find

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"unicode/utf16"
)

const (
	maxPartitions = 128
	// maxTable bounds a GPT's array of entries: 128 of 128 bytes are what every tool makes.
	maxTable = 1 << 20
)

// partition is a range of the disk that may have a file system.
type partition struct {
	number int // 0: the whole disk
	scheme string
	start  int64 // bytes
	size   int64
	uuid   string // as in PARTUUID=; "": none
	label  string // as in PARTLABEL=
	kind   string // its type's GUID or number
}

// String names the partition.
func (p partition) String() string {
	if p.number == 0 {
		return "the disk without partitions"
	}
	return fmt.Sprintf("partition %d", p.number)
}

// grub is how GRUB names it on the first disk.
func (p partition) grub() string {
	if p.number == 0 {
		return "hd0"
	}
	return fmt.Sprintf("hd0,%s%d", p.scheme, p.number)
}

// partitions reads the disk's table of partitions; a disk without one is one partition.
func partitions(d io.ReaderAt, size int64) ([]partition, error) {
	whole := []partition{{size: size}}
	mbr := make([]byte, 512)
	if err := readFull(d, mbr, 0); err != nil {
		return nil, err
	}
	if fileSystemHere(d, size) { // a FAT's boot sector ends like an MBR, and an ISO may have one
		return whole, nil
	}
	if mbr[510] != 0x55 || mbr[511] != 0xaa {
		return whole, nil
	}
	for i := range 4 {
		if mbr[446+16*i+4] == 0xee { // protective
			list, err := readGPT(d, size)
			if err != nil {
				return nil, fmt.Errorf("GPT: %w", err)
			}
			return list, nil
		}
	}
	list := readMBR(d, mbr, size)
	if len(list) == 0 {
		return whole, nil
	}
	return list, nil
}

// readGPT reads a GUID partition table (UEFI 2.10, 5.3), the primary one, or else the one at
// the disk's end.
func readGPT(d io.ReaderAt, size int64) ([]partition, error) {
	var first error
	for _, sector := range []int64{512, 4096} {
		for _, at := range []int64{sector, size - sector} {
			list, err := readGPTAt(d, size, at, sector)
			if err == nil {
				return list, nil
			}
			if first == nil {
				first = err
			}
		}
	}
	return nil, first
}

func readGPTAt(d io.ReaderAt, size, at, sector int64) ([]partition, error) {
	h := make([]byte, 512)
	if err := readFull(d, h, at); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if string(h[:8]) != "EFI PART" {
		return nil, errors.New("no header")
	}
	array, n, each := le.Uint64(h[72:]), int64(le.Uint32(h[80:])), int64(le.Uint32(h[84:]))
	if each < 128 || each > 4096 || n > maxTable/each || array > uint64(size/sector) {
		return nil, fmt.Errorf("%d entries of %d bytes at block %d: out of bounds", n, each, array)
	}
	table := make([]byte, n*each)
	if err := readFull(d, table, int64(array)*sector); err != nil {
		return nil, fmt.Errorf("read its entries: %w", err)
	}
	var list []partition
	for i := range int(n) {
		e := table[int64(i)*each:]
		if bytes.Equal(e[:16], make([]byte, 16)) {
			continue
		}
		start, end := le.Uint64(e[32:]), le.Uint64(e[40:])
		if start > end || end >= uint64(size/sector) {
			continue
		}
		list = append(list, partition{number: i + 1, scheme: "gpt", start: int64(start) * sector, size: int64(end-start+1) * sector,
			kind: guid(e[:16]), uuid: guid(e[16:32]), label: utf16Name(e[56:128])})
		if len(list) == maxPartitions {
			break
		}
	}
	return list, nil
}

// guid is a GUID's text: its first three fields are little-endian.
func guid(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

func utf16Name(b []byte) string {
	var u []uint16
	for i := 0; i+1 < len(b); i += 2 {
		c := binary.LittleEndian.Uint16(b[i:])
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u))
}

// readMBR reads a PC's partition table with its logical partitions.
func readMBR(d io.ReaderAt, mbr []byte, size int64) (list []partition) {
	le := binary.LittleEndian
	signature := le.Uint32(mbr[440:])
	add := func(number int, kind byte, start, sectors int64) {
		if kind == 0 || sectors == 0 || start*512 >= size || len(list) == maxPartitions {
			return
		}
		p := partition{number: number, scheme: "msdos", start: start * 512, size: min(sectors*512, size-start*512), kind: fmt.Sprintf("0x%02x", kind)}
		if signature != 0 {
			p.uuid = fmt.Sprintf("%08x-%02x", signature, number)
		}
		list = append(list, p)
	}
	isExtended := func(kind byte) bool { return kind == 0x05 || kind == 0x0f || kind == 0x85 }
	logical := 5
	for i := range 4 {
		e := mbr[446+16*i:]
		kind, start, sectors := e[4], int64(le.Uint32(e[8:])), int64(le.Uint32(e[12:]))
		if !isExtended(kind) {
			add(i+1, kind, start, sectors)
			continue
		}
		// A chain of tables: the first entry of each is a partition, relative to the table,
		// the second the next table, relative to the extended partition.
		for at, n := start, 0; n < maxPartitions; n++ {
			table := make([]byte, 512)
			if readFull(d, table, at*512) != nil || table[510] != 0x55 || table[511] != 0xaa {
				break
			}
			one, next := table[446:462], table[462:478]
			if one[4] != 0 {
				add(logical, one[4], at+int64(le.Uint32(one[8:])), int64(le.Uint32(one[12:])))
				logical++
			}
			if !isExtended(next[4]) {
				break
			}
			at = start + int64(le.Uint32(next[8:]))
		}
	}
	return list
}

// readFull reads all of p.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}
