// Package snapshot keeps a guest in a directory, and reads it from there: a manifest, the
// machine's description and state, its kernel, and its memory as a sparse file with each
// page at its own offset, so that it can be mapped.
//
// A snapshot is taken by a migration into the directory: [Keep] receives one, and writes
// under another name until all is complete and on disk. [Open] checks what is in a
// directory, which may be damaged, or made by anybody. docs/snapshots.md describes the
// files.
package snapshot

import (
	"errors"
	"fmt"

	"github.com/govmm/govmm/vmm/machine"
)

// Files of a snapshot. Disks are in disk0.img and so on, by their order.
const (
	manifestFile = "manifest.json"
	specFile     = "spec.cbor"
	stateFile    = "state.cbor"
	storageFile  = "storage.cbor" // what disks are known by, see migrate.Sampler
	kernelFile   = "kernel"
	initrdFile   = "initrd"
	hotFile      = "hot"        // ranges of pages that the guest was writing
	memoryFile   = "memory"     // each page at its own offset
	packedFile   = "memory.zst" // or packed, with an index
	indexFile    = "memory.index"
)

// mostOf bounds the size of a part, in bytes. Parts without one are as large as the
// guest's memory says.
var mostOf = map[string]int64{
	specFile: 16 << 20, stateFile: 64 << 20, storageFile: 1 << 20, hotFile: maxHot * hotBytes,
	kernelFile: machine.MaxKernel, initrdFile: machine.MaxInitrd,
}

// diskFile is the name of a disk's file.
func diskFile(i int) string { return fmt.Sprintf("disk%d.img", i) }

// Disks says what becomes of the guest's disks.
type Disks string

// What becomes of disks.
const (
	// DisksNone leaves them where they are. Who restores gives the same content.
	DisksNone Disks = "none"
	// DisksReflink keeps a clone of each image that shares its blocks, made while the guest
	// stands still, or a copy where the file system has no clones.
	DisksReflink Disks = "reflink"
	// DisksCopy keeps a copy of each image, made while the guest stands still.
	DisksCopy Disks = "copy"
)

// ParseDisks reads one.
func ParseDisks(s string) (Disks, error) {
	switch d := Disks(s); d {
	case DisksNone, DisksReflink, DisksCopy:
		return d, nil
	}
	return "", fmt.Errorf("%.80q: expected %s, %s or %s", s, DisksNone, DisksReflink, DisksCopy)
}

// Compression is how memory is kept.
type Compression string

// Compressions.
const (
	CompressNone Compression = "none"
	// CompressZstd keeps memory packed: it cannot be mapped then.
	CompressZstd Compression = "zstd"
)

// ParseCompression reads one.
func ParseCompression(s string) (Compression, error) {
	switch c := Compression(s); c {
	case CompressNone, CompressZstd:
		return c, nil
	}
	return "", fmt.Errorf("%.80q: expected %s or %s", s, CompressNone, CompressZstd)
}

// Errors of Open, matched with errors.Is.
var (
	// ErrDamaged: the directory is no snapshot, or not the one that was written.
	ErrDamaged = errors.New("not a whole snapshot")
	// ErrNewer: it was made by a version of govmm that knows more.
	ErrNewer = errors.New("made by a newer govmm")
)
