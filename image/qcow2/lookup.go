package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"sync"
)

// Entries of tables.
const (
	offsetMask     = 1<<56 - 1<<9 // in an L1 entry and in that of a normal cluster
	flagZero       = 1 << 0
	flagCompressed = 1 << 62
	descriptorMask = 1<<62 - 1
	reservedL1     = 0x7f<<56 | 0x1ff

	subclusters = 32
)

const (
	// pieceBytes is how much of a table is read at once, if the table has as much.
	pieceBytes = 64 << 10
	// cachedBytes is how much of the tables of an image is kept in memory.
	cachedBytes = 2 << 20
)

// kind is where the bytes of a part of the disk are.
type kind int

const (
	absent     kind = iota // in the backing file, or zero without one
	zero                   // nowhere: they are zeros
	normal                 // in the file as they are
	compressed             // in the file
)

// extent is a part of the disk that lies in one piece.
type extent struct {
	kind   kind
	host   int64 // where it is in the file; normal and compressed
	length int64 // bytes
	stored int64 // bytes in the file, of a compressed cluster
	within int64 // bytes of the compressed cluster that are before it
}

// tables reads pieces of tables and keeps some of them.
type tables struct {
	r     io.ReaderAt
	size  int64 // of the file
	piece int64

	keptMu sync.RWMutex // guards kept
	kept   map[int64][]byte
}

// at returns 8 bytes or more of the file at an offset that is a multiple of 8: all of
// the piece from there on.
func (t *tables) at(off int64) ([]byte, error) {
	start := off &^ (t.piece - 1)
	t.keptMu.RLock()
	b := t.kept[start]
	t.keptMu.RUnlock()
	if b == nil {
		b = make([]byte, t.piece)
		// A table is whole clusters; the last one of a file may be cut, and what it lacks is zeros.
		n, err := t.r.ReadAt(b, start)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read a table at offset %d: %w", start, err)
		}
		if n == 0 {
			return nil, damaged("a table at offset %d is behind the end of the file of %d bytes: is the file whole?", start, t.size)
		}
		t.keptMu.Lock()
		if int64(len(t.kept)) >= max(cachedBytes/t.piece, 1) {
			for old := range t.kept { // any
				delete(t.kept, old)
				break
			}
		}
		t.kept[start] = b
		t.keptMu.Unlock()
	}
	return b[off-start:], nil
}

// secondTable returns where the second table for an offset of the disk is; 0: there is none.
func (im *Image) secondTable(index int64) (int64, error) {
	b, err := im.tables.at(im.l1Offset + index*8)
	if err != nil {
		return 0, err
	}
	entry := binary.BigEndian.Uint64(b)
	off := int64(entry & offsetMask)
	switch {
	case entry&reservedL1 != 0:
		return 0, damaged("entry %d of its first table has reserved bits: %#x", index, entry)
	case off&(im.ClusterSize()-1) != 0:
		return 0, damaged("entry %d of its first table: a second table at offset %d, which is no cluster's", index, off)
	case off >= im.tables.size:
		return 0, damaged("entry %d of its first table: a second table at offset %d of a file of %d bytes: is the file whole?", index, off, im.tables.size)
	}
	return off, nil
}

// lookup finds the extent that begins at an offset inside the disk. It may end early,
// but not before the end of a cluster or subcluster.
func (im *Image) lookup(off int64) (extent, error) {
	cluster, entryBytes := im.ClusterSize(), im.entryBytes()
	entries := cluster / entryBytes
	index := off >> im.ClusterBits
	table, err := im.secondTable(index / entries)
	if err != nil {
		return extent{}, err
	}
	left := im.DiskSize - off
	first := index % entries
	if table == 0 {
		return extent{kind: absent, length: min((entries-first)*cluster-off&(cluster-1), left)}, nil
	}
	b, err := im.tables.at(table + first*entryBytes)
	if err != nil {
		return extent{}, err
	}
	var all extent
	for within := off & (cluster - 1); len(b) >= int(entryBytes); within = 0 {
		e, err := im.entry(b, within)
		if err != nil {
			return extent{}, fmt.Errorf("the cluster at %d of the disk: %w", (off+all.length)&^(cluster-1), err)
		}
		if all.length == 0 {
			all = e
		} else if all.follows(e) {
			all.length += e.length
		} else {
			break
		}
		if all.kind == compressed || all.length >= left || within+e.length < cluster {
			break // one at a time; or the next subcluster differs
		}
		b = b[entryBytes:]
	}
	all.length = min(all.length, left)
	return all, nil
}

// follows reports whether e continues a.
func (a extent) follows(e extent) bool {
	return a.kind == e.kind && a.kind != compressed && (a.kind != normal || a.host+a.length == e.host)
}

// entry reads the entry of a second table at b: what is from within on in its cluster.
func (im *Image) entry(b []byte, within int64) (extent, error) {
	cluster := im.ClusterSize()
	entry := binary.BigEndian.Uint64(b)
	if entry&flagCompressed != 0 {
		return im.compressedEntry(entry&descriptorMask, within)
	}
	host := int64(entry & offsetMask)
	if host&(cluster-1) != 0 {
		return extent{}, damaged("it is at offset %d of the file, which is no cluster's", host)
	}
	e := extent{kind: normal, host: host + within, length: cluster - within}
	var err error
	switch {
	case im.ExtendedL2:
		e, err = im.subclustered(e, host, within, binary.BigEndian.Uint64(b[8:]))
	case entry&flagZero != 0 && im.Version < 3:
		err = damaged("it is marked as zeros, in an image of version 2")
	case entry&flagZero != 0:
		e.kind = zero
	case host == 0:
		e.kind = absent
	}
	if err == nil && e.kind == normal && host >= im.tables.size {
		err = damaged("it is at offset %d of a file of %d bytes: is the file whole?", host, im.tables.size)
	}
	return e, err
}

// subclustered cuts e to the subclusters that are alike. The lower half of status says which
// are in the file, the upper half which are zeros.
func (im *Image) subclustered(e extent, host, within int64, status uint64) (extent, error) {
	allocated, zeros := uint32(status), uint32(status>>subclusters)
	if allocated&zeros != 0 || host == 0 && allocated != 0 {
		return e, damaged("the states of its subclusters contradict each other: %#x", status)
	}
	size := im.ClusterSize() / subclusters
	first := within / size
	of := func(i int64) kind {
		switch {
		case zeros>>i&1 != 0:
			return zero
		case allocated>>i&1 != 0:
			return normal
		}
		return absent
	}
	e.kind = of(first)
	end := first + 1
	for end < subclusters && of(end) == e.kind {
		end++
	}
	e.length = end*size - within
	return e, nil
}

// compressedEntry reads the descriptor of a compressed cluster: an offset in bytes, and
// how many more sectors the data reaches into.
func (im *Image) compressedEntry(descriptor uint64, within int64) (extent, error) {
	offsetBits := 62 - (im.ClusterBits - 8)
	host := int64(descriptor & (1<<offsetBits - 1))
	sectors := int64(descriptor>>offsetBits) + 1
	stored := sectors*512 - host&511
	if host >= im.tables.size || host == 0 {
		return extent{}, damaged("its compressed data is at offset %d of a file of %d bytes: is the file whole?", host, im.tables.size)
	}
	stored = min(stored, im.tables.size-host) // the last sector of a file may be cut
	return extent{kind: compressed, host: host, stored: stored, within: within, length: im.ClusterSize() - within}, nil
}

// pieceSize is how much of a table is read at once: tables begin at multiples of a cluster.
func pieceSize(clusterBits uint32) int64 {
	return 1 << min(clusterBits, uint32(bits.TrailingZeros(pieceBytes)))
}
