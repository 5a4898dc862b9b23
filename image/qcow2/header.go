// Package qcow2 reads disk images in QEMU's format qcow2, versions 2 and 3, and never
// writes them.
//
// The format is described in QEMU's docs/interop/qcow2.rst. An image is a header, a
// first table (L1) whose entries point to second tables (L2), whose entries say where
// the clusters of the disk are: in the file as they are, in the file compressed,
// nowhere (they are zeros), or in another image, the backing file.
//
// All that a file says is taken for hostile: offsets are checked where they are used,
// tables are read in pieces of bounded size, and a piece that is not needed soon is
// dropped. Reference counts, internal snapshots and bitmaps are for writers: they are
// not read.
//
//	f, err := os.Open("debian.qcow2")
//	im, err := qcow2.New(f, size, nil)
//	n, err := im.ReadAt(p, off)
//
// An [Image] may be used by several goroutines at once.
package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"strings"
)

// Magic is how a file of the format begins.
const Magic = "QFI\xfb"

const (
	headerBytesV2 = 72
	headerBytesV3 = 104

	minClusterBits = 9
	maxClusterBits = 21
	// minExtendedBits: a subcluster, a 32nd of a cluster, is no smaller than a sector.
	minExtendedBits = 14
	// maxL1 bounds the first table, in entries, as QEMU does: 32 MiB.
	maxL1 = 32 << 20 / 8
	// maxSize bounds a disk: each offset is an int64, with room to add.
	maxSize = 1 << 62
	// maxBackingName is the longest name of a backing file.
	maxBackingName = 1023
)

// Incompatible features, by bit.
const (
	featureDirty = 1 << iota
	featureCorrupt
	featureDataFile
	featureCompression
	featureExtendedL2

	knownFeatures = 1<<iota - 1
)

// Header extensions.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extEncryption    = 0x0537be77
	extDataFile      = 0x44415441
)

// ErrRefused is wrapped by the errors for images that use what this package does not
// read: encryption, external data files, features that it does not know.
var ErrRefused = errors.New("the image is not readable here")

// ErrDamaged is wrapped by the errors for images that break a rule of the format.
var ErrDamaged = errors.New("the image is damaged")

// Header is what an image says about itself.
type Header struct {
	Version     uint32
	DiskSize    int64 // bytes
	ClusterBits uint32
	// Backing is the name of the file that has what this one lacks; "": none.
	Backing string
	// BackingFormat is that file's format; "": the image does not say.
	BackingFormat string
	// Snapshots is how many internal snapshots the file has. They are not read.
	Snapshots     uint32
	RefcountBits  uint32
	Compression   string // of the clusters that are compressed: zlib or zstd
	Dirty         bool   // a writer has not closed it; its reference counts may be wrong
	LazyRefcounts bool
	ExtendedL2    bool // with subclusters

	l1Offset int64
	l1Size   int64 // entries that are used
}

// ClusterSize is the size of a cluster in bytes.
func (h *Header) ClusterSize() int64 { return 1 << h.ClusterBits }

func damaged(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, a...))
}

func refused(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrRefused, fmt.Sprintf(format, a...))
}

// ParseHeader reads and checks the header of a file of fileSize bytes.
func ParseHeader(r io.ReaderAt, fileSize int64) (*Header, error) {
	var b [headerBytesV3 + 8]byte
	if n, err := r.ReadAt(b[:], 0); n < headerBytesV2 {
		if err == nil || errors.Is(err, io.EOF) {
			return nil, damaged("expected a header of %d bytes, found a file of %d", headerBytesV2, n)
		}
		return nil, fmt.Errorf("read the header: %w", err)
	}
	be := binary.BigEndian
	if string(b[:4]) != Magic {
		return nil, damaged("expected it to begin with %q, found %q", Magic, b[:4])
	}
	h := &Header{Version: be.Uint32(b[4:]), ClusterBits: be.Uint32(b[20:]), Snapshots: be.Uint32(b[60:]), RefcountBits: 16, Compression: "zlib"}
	if h.Version != 2 && h.Version != 3 {
		return nil, refused("expected version 2 or 3, found %d", h.Version)
	}
	if h.ClusterBits < minClusterBits || h.ClusterBits > maxClusterBits {
		return nil, damaged("expected clusters of 2^%d to 2^%d bytes, found 2^%d", minClusterBits, maxClusterBits, h.ClusterBits)
	}
	if method := be.Uint32(b[32:]); method != 0 {
		return nil, refused("it is encrypted (method %d)", method)
	}
	end := int64(headerBytesV2)
	var features uint64
	if h.Version >= 3 {
		features = be.Uint64(b[72:])
		var err error
		if end, err = h.version3(b[:], features); err != nil {
			return nil, err
		}
	}
	if err := h.extensions(r, end, int64(be.Uint64(b[8:])), features); err != nil {
		return nil, err
	}
	if err := h.backing(r, end, be.Uint64(b[8:]), be.Uint32(b[16:])); err != nil {
		return nil, err
	}
	return h, h.tables(be.Uint64(b[24:]), be.Uint32(b[36:]), be.Uint64(b[40:]), fileSize)
}

// version3 checks what version 3 added, but for unknown features. It returns the
// header's length.
func (h *Header) version3(b []byte, features uint64) (int64, error) {
	be := binary.BigEndian
	length := be.Uint32(b[100:])
	if length < headerBytesV3 || length%8 != 0 || int64(length) > h.ClusterSize() {
		return 0, damaged("a header of %d bytes", length)
	}
	if length > headerBytesV3 && b[104] > 0 {
		if h.Compression = "zstd"; b[104] != 1 {
			return 0, refused("its compression is of type %d: zlib (0) and zstd (1) are known", b[104])
		}
	}
	if (features&featureCompression != 0) != (h.Compression != "zlib") {
		return 0, damaged("its compression is %s, which its features contradict", h.Compression)
	}
	order := be.Uint32(b[96:])
	if order > 6 {
		return 0, damaged("expected reference counts of at most 64 bits, found 2^%d", order)
	}
	h.RefcountBits = 1 << order
	h.Dirty, h.ExtendedL2 = features&featureDirty != 0, features&featureExtendedL2 != 0
	h.LazyRefcounts = be.Uint64(b[80:])&1 != 0
	switch {
	case features&featureCorrupt != 0:
		return 0, refused("it is marked as corrupt; qemu-img check -r all mends what can be mended")
	case features&featureDataFile != 0:
		return 0, refused("its data is in another file (external data file); qemu-img convert makes one image of both")
	case h.ExtendedL2 && h.ClusterBits < minExtendedBits:
		return 0, damaged("it has subclusters of clusters of %d bytes", h.ClusterSize())
	}
	return int64(length), nil
}

// extensions reads the header extensions between the header's end and the name of the
// backing file, or the end of the first cluster. Names of unknown features are there.
func (h *Header) extensions(r io.ReaderAt, at, backing int64, features uint64) error {
	limit := h.ClusterSize()
	if backing > 0 && backing < limit {
		limit = backing
	}
	unknown := features &^ knownFeatures
	names := make([]string, 0, bits.OnesCount64(unknown))
	for at+8 <= limit {
		var b [8]byte
		if n, err := r.ReadAt(b[:], at); n < len(b) {
			if errors.Is(err, io.EOF) {
				break
			}
			return fmt.Errorf("read the header extensions: %w", err)
		}
		kind, n := binary.BigEndian.Uint32(b[:]), int64(binary.BigEndian.Uint32(b[4:]))
		if at += 8; kind == extEnd {
			break
		}
		if n > limit-at {
			return damaged("a header extension of %d bytes, of which %d are in the first cluster", n, limit-at)
		}
		switch kind {
		case extEncryption:
			return refused("it is encrypted")
		case extDataFile:
			if features&featureDataFile != 0 {
				return refused("its data is in another file (external data file)")
			}
		case extBackingFormat, extFeatureNames:
			if n > 4096 {
				return damaged("a header extension of %d bytes for names", n)
			}
			data := make([]byte, n)
			if got, err := r.ReadAt(data, at); int64(got) < n {
				return fmt.Errorf("read the header extensions: %w", err)
			}
			if kind == extBackingFormat {
				h.BackingFormat = string(data)
			} else {
				names = append(names, featureNames(data, unknown)...)
			}
		}
		at += (n + 7) &^ 7
	}
	if unknown != 0 {
		if len(names) == 0 {
			return refused("it uses features that are unknown here: %#x", unknown)
		}
		return refused("it uses features that are unknown here: %q (%#x)", strings.Join(names, ", "), unknown)
	}
	return nil
}

// featureNames returns the names of the incompatible features of a set, as a table in an image has them.
func featureNames(table []byte, set uint64) (names []string) {
	for ; len(table) >= 48; table = table[48:] {
		kind, bit := table[0], table[1]
		if kind == 0 && bit < 64 && set&(1<<bit) != 0 && len(names) < 64 {
			name, _, _ := strings.Cut(string(table[2:48]), "\x00")
			names = append(names, name)
		}
	}
	return names
}

// backing reads the name of the backing file.
func (h *Header) backing(r io.ReaderAt, end int64, off uint64, n uint32) error {
	if off == 0 || n == 0 {
		return nil
	}
	if n > maxBackingName || off < uint64(end) || off+uint64(n) > uint64(h.ClusterSize()) || off > 1<<32 {
		return damaged("the name of its backing file, %d bytes at offset %d, is not in its first cluster", n, off)
	}
	name := make([]byte, n)
	if got, err := r.ReadAt(name, int64(off)); got < len(name) {
		return fmt.Errorf("read the name of the backing file: %w", err)
	}
	h.Backing = string(name)
	return nil
}

// tables checks the size of the disk and the place of the first table.
func (h *Header) tables(size uint64, l1Size uint32, l1Offset uint64, fileSize int64) error {
	if size > maxSize {
		return damaged("a disk of %d bytes", size)
	}
	h.DiskSize, h.l1Offset = int64(size), int64(l1Offset)
	perTable := h.ClusterSize() * (h.ClusterSize() / h.entryBytes())
	h.l1Size = (h.DiskSize + perTable - 1) / perTable
	switch {
	case int64(l1Size) < h.l1Size:
		return damaged("a disk of %d bytes needs a first table of %d entries, which has %d", size, h.l1Size, l1Size)
	case l1Size > maxL1:
		return damaged("a first table of %d entries: expected at most %d", l1Size, maxL1)
	case h.l1Size == 0:
		return nil
	case l1Offset == 0 || l1Offset&uint64(h.ClusterSize()-1) != 0:
		return damaged("its first table is at offset %d, which is no cluster's", l1Offset)
	case l1Offset > uint64(fileSize) || h.l1Size*8 > fileSize-h.l1Offset:
		return damaged("its first table, %d entries at offset %d, is not all in the file of %d bytes", h.l1Size, l1Offset, fileSize)
	}
	return nil
}

// entryBytes is the size of an entry of a second table.
func (h *Header) entryBytes() int64 {
	if h.ExtendedL2 {
		return 16
	}
	return 8
}
