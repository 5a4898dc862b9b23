package find

import (
	"encoding/binary"
	"errors"
)

// A file system that was not unmounted has its newest metadata in its journal only: a
// kernel that was installed, written with sync(2) and booted by a reset would not be there
// without it. So the journal is read as mount(8) would, without writing anything:
// blocks of complete transactions are found where the journal has them. Documentation:
// the kernel's filesystems/ext4/journal.rst. Fast commits are left out.

const (
	journalMagic = 0xc03b3998

	journalDescriptor = 1
	journalCommit     = 2
	journalRevoke     = 5

	journal64bit      = 0x2
	journalChecksum2  = 0x8
	journalChecksum3  = 0x10
	journalFastCommit = 0x20

	tagEscaped  = 1
	tagSameUUID = 2
	tagLast     = 8

	maxJournal = 1 << 20 // blocks
)

// tag is a block that the journal has.
type tag struct {
	block    uint64
	where    int64 // bytes; of an escaped one ^where
	sequence uint32
}

// journal is what is being read.
type journal struct {
	r        *ext4Reader
	b        []byte // one block
	run      run
	at       uint64 // where run begins
	first    uint64
	last     uint64 // behind its last block
	features uint32
	tags     []tag
	revoked  map[uint64]uint32 // by which transaction
}

// replay finds out which blocks of the file system are in its journal.
func (e *ext4) replay(number uint32) error {
	i, err := e.inode(number)
	if err != nil {
		return err
	}
	be := binary.BigEndian
	j := &journal{r: e.reader(i).(*ext4Reader), b: make([]byte, e.blockSize), revoked: make(map[uint64]uint32)}
	if err := j.read(0); err != nil {
		return err
	}
	if be.Uint32(j.b) != journalMagic || int64(be.Uint32(j.b[0xc:])) != e.blockSize {
		return errors.New("no superblock")
	}
	j.features = be.Uint32(j.b[0x28:])
	j.last, j.first = uint64(be.Uint32(j.b[0x10:])), uint64(be.Uint32(j.b[0x14:]))
	sequence, start := be.Uint32(j.b[0x18:]), uint64(be.Uint32(j.b[0x1c:]))
	if j.features&journalFastCommit != 0 {
		fast := uint64(be.Uint32(j.b[0x54:]))
		if fast == 0 {
			fast = 256
		}
		j.last -= min(fast, j.last)
	}
	if start == 0 {
		return nil // nothing is in it
	}
	if j.first == 0 || start < j.first || start >= j.last || j.last > maxJournal {
		return errors.New("its superblock is damaged")
	}
	if err := j.scan(start, sequence); err != nil {
		return err
	}
	e.replayed = make(map[uint64]int64)
	for _, t := range j.tags {
		if by, ok := j.revoked[t.block]; ok && int32(by-t.sequence) >= 0 {
			continue
		}
		e.replayed[t.block] = t.where
	}
	return nil
}

// where returns the place of a block of the journal on the disk.
func (j *journal) where(n uint64) (int64, error) {
	if n < j.at || n-j.at >= j.run.n || j.run.zero {
		found, err := j.r.find(n)
		if err != nil {
			return 0, err
		}
		if found.zero || found.n == 0 {
			return 0, errors.New("it has a hole")
		}
		j.run, j.at = found, n
	}
	block := j.run.block + n - j.at
	if block >= j.r.e.blocks {
		return 0, errors.New("it is outside of the file system")
	}
	return int64(block) * j.r.e.blockSize, nil
}

func (j *journal) read(n uint64) error {
	at, err := j.where(n)
	if err != nil {
		return err
	}
	return readFull(j.r.e.r, j.b, at)
}

// next is the block after one: the journal is a ring.
func (j *journal) next(n uint64) uint64 {
	if n++; n >= j.last {
		n = j.first
	}
	return n
}

// scan reads transactions until one is not complete.
func (j *journal) scan(at uint64, sequence uint32) error {
	be := binary.BigEndian
	var tags []tag
	revoked := make(map[uint64]uint32)
	for left := j.last; left > 0; left-- {
		if err := j.read(at); err != nil {
			return err
		}
		if be.Uint32(j.b) != journalMagic || be.Uint32(j.b[8:]) != sequence {
			return nil
		}
		at = j.next(at)
		switch be.Uint32(j.b[4:]) {
		case journalDescriptor:
			more, n, err := j.descriptor(at, sequence)
			if err != nil {
				return err
			}
			for range n {
				at = j.next(at)
			}
			tags = append(tags, more...)
			left -= min(left-1, n)
		case journalRevoke:
			j.revocations(sequence, revoked)
		case journalCommit:
			j.tags = append(j.tags, tags...)
			for b, s := range revoked {
				j.revoked[b] = s
			}
			tags = nil
			clear(revoked)
			sequence++
		default:
			return nil
		}
	}
	return nil
}

// descriptor reads the tags of a descriptor, whose blocks follow from at on.
func (j *journal) descriptor(at uint64, sequence uint32) (tags []tag, n uint64, err error) {
	be := binary.BigEndian
	size := 8
	switch {
	case j.features&journalChecksum3 != 0:
		size = 16
	default:
		if j.features&journal64bit != 0 {
			size += 4
		}
		if j.features&journalChecksum2 != 0 {
			size += 2
		}
	}
	b := j.b[12:]
	if j.features&(journalChecksum2|journalChecksum3) != 0 {
		b = b[:len(b)-4]
	}
	for len(b) >= size {
		t := tag{block: uint64(be.Uint32(b)), sequence: sequence}
		flags := uint32(be.Uint16(b[6:]))
		if j.features&journalChecksum3 != 0 {
			flags = be.Uint32(b[4:])
		}
		if j.features&journal64bit != 0 {
			t.block |= uint64(be.Uint32(b[8:])) << 32
		}
		if t.where, err = j.where(at); err != nil {
			return nil, 0, err
		}
		if flags&tagEscaped != 0 {
			t.where = ^t.where
		}
		tags, n, at = append(tags, t), n+1, j.next(at)
		b = b[size:]
		if flags&tagSameUUID == 0 {
			b = b[min(16, len(b)):]
		}
		if flags&tagLast != 0 {
			break
		}
	}
	return tags, n, nil
}

// revocations reads which blocks must not be taken from this transaction or an earlier one.
func (j *journal) revocations(sequence uint32, revoked map[uint64]uint32) {
	be := binary.BigEndian
	b := j.b[:min(int(be.Uint32(j.b[12:])), len(j.b))]
	size := 4
	if j.features&journal64bit != 0 {
		size = 8
	}
	for off := 16; off+size <= len(b); off += size {
		if size == 8 {
			revoked[be.Uint64(b[off:])] = sequence
		} else {
			revoked[uint64(be.Uint32(b[off:]))] = sequence
		}
	}
}
