package find

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
)

// The ext4 of this package reads ext2, ext3 and ext4, as the kernel's
// Documentation/filesystems/ext4 describes them: block maps and extents, holes, inline
// data, all sizes of blocks and groups. Directories are read from their beginning to their
// end, which their hash trees allow. The journal's records are looked up first (journal.go), so that a file system
// that was not unmounted is read as it will be mounted. Checksums are not looked at: a
// wrong one is for fsck.

// Offsets in the superblock, which is 1024 bytes at 1024.
const (
	sbInodes        = 0x00
	sbBlocksLow     = 0x04
	sbFirstBlock    = 0x14
	sbLogBlock      = 0x18
	sbBlocksInGroup = 0x20
	sbInodesInGroup = 0x28
	sbMagic         = 0x38
	sbRevision      = 0x4c
	sbInodeSize     = 0x58
	sbIncompatible  = 0x60
	sbUUID          = 0x68
	sbLabel         = 0x78
	sbJournalInode  = 0xe0
	sbDescSize      = 0xfe
	sbFirstMeta     = 0x104
	sbBlocksHigh    = 0x150

	ext4Magic = 0xef53
)

// Incompatible features.
const (
	hasRecovery  = 0x4
	hasJournal   = 0x8 // the file system is another one's journal
	hasMetaBG    = 0x10
	has64bit     = 0x80
	understood   = 0x2 | hasRecovery | hasMetaBG | 0x40 | has64bit | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000
	inodeExtents = 0x80000
	inodeInline  = 0x10000000
	inodeCrypt   = 0x800
)

const rootInode = 2

// ext4 is a file system. Nothing in it changes while it is read.
type ext4 struct {
	r          io.ReaderAt
	blockSize  int64
	blocks     uint64
	inodes     uint32
	perGroup   uint32 // inodes
	inodeSize  int64
	descSize   int64
	firstBlock uint64
	metaBG     bool
	firstMeta  uint64
	blocksIn   uint64           // of a group
	wide       bool             // block numbers have 64 bits
	replayed   map[uint64]int64 // blocks that the journal has: where, see tag
	known      map[string]uint32
}

// inode is a file's.
type inode struct {
	number uint32
	mode   uint16
	size   int64
	flags  uint32
	block  [60]byte // the block map, the extents' root, or the data itself
	tail   []byte   // what follows its fixed fields: extended attributes
}

func openExt4(r io.ReaderAt, size int64) (_ *ext4, uuid, label string, err error) {
	sb := make([]byte, 1024)
	if err := readFull(r, sb, 1024); err != nil {
		return nil, "", "", err
	}
	le := binary.LittleEndian
	if le.Uint16(sb[sbMagic:]) != ext4Magic {
		return nil, "", "", errors.New("no superblock")
	}
	uuid, label = uuidText(sb[sbUUID:sbUUID+16]), cString(sb[sbLabel:sbLabel+16])
	e := &ext4{r: r, inodes: le.Uint32(sb[sbInodes:]), perGroup: le.Uint32(sb[sbInodesInGroup:]), blocks: uint64(le.Uint32(sb[sbBlocksLow:])),
		firstBlock: uint64(le.Uint32(sb[sbFirstBlock:])), inodeSize: 128, descSize: 32, blocksIn: uint64(le.Uint32(sb[sbBlocksInGroup:])), known: make(map[string]uint32)}
	log := le.Uint32(sb[sbLogBlock:])
	if log > 6 {
		return nil, "", "", fmt.Errorf("blocks of 2^%d KiB: expected at most 64 KiB", log)
	}
	e.blockSize = 1024 << log
	features := uint32(0)
	if le.Uint32(sb[sbRevision:]) > 0 {
		features, e.inodeSize = le.Uint32(sb[sbIncompatible:]), int64(le.Uint16(sb[sbInodeSize:]))
	}
	if unknown := features &^ understood; unknown != 0 {
		return nil, "", "", fmt.Errorf("features %#x are not understood", unknown)
	}
	if features&has64bit != 0 {
		e.wide, e.descSize = true, int64(le.Uint16(sb[sbDescSize:]))
		e.blocks |= uint64(le.Uint32(sb[sbBlocksHigh:])) << 32
	}
	e.metaBG, e.firstMeta = features&hasMetaBG != 0, uint64(le.Uint32(sb[sbFirstMeta:]))
	if e.perGroup == 0 || e.blocksIn == 0 || e.inodeSize < 128 || e.inodeSize > e.blockSize || e.inodeSize&(e.inodeSize-1) != 0 ||
		e.descSize < 32 || e.descSize > 1024 || e.wide && e.descSize < 64 {
		return nil, "", "", errors.New("its superblock is damaged")
	}
	e.blocks = min(e.blocks, uint64(size/e.blockSize))
	if features&hasRecovery != 0 {
		if err := e.replay(le.Uint32(sb[sbJournalInode:])); err != nil {
			return nil, "", "", fmt.Errorf("its journal: %w", err)
		}
	}
	return e, uuid, label, nil
}

// uuidText is a UUID's text, all of whose fields are big-endian.
func uuidText(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

func cString(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// readBlocks reads whole blocks, or a part of one.
func (e *ext4) readBlocks(p []byte, block uint64) error {
	n := (uint64(len(p)) + uint64(e.blockSize) - 1) / uint64(e.blockSize)
	if block > e.blocks || n > e.blocks-block {
		return fmt.Errorf("blocks %d to %d: the file system has %d", block, block+n, e.blocks)
	}
	if len(e.replayed) == 0 {
		return readFull(e.r, p, int64(block)*e.blockSize)
	}
	for ; len(p) > 0; block++ {
		at := int64(block) * e.blockSize
		where, ok := e.replayed[block]
		escaped := ok && where < 0
		if escaped {
			at = ^where
		} else if ok {
			at = where
		}
		m := min(int64(len(p)), e.blockSize)
		if err := readFull(e.r, p[:m], at); err != nil {
			return err
		}
		if escaped && m >= 4 { // the journal's own number must not be at the beginning of its blocks
			binary.BigEndian.PutUint32(p, journalMagic)
		}
		p = p[m:]
	}
	return nil
}

// at reads a few bytes that do not cross a block.
func (e *ext4) at(p []byte, block uint64, off int64) error {
	b := make([]byte, off+int64(len(p)))
	if err := e.readBlocks(b, block); err != nil {
		return err
	}
	copy(p, b[off:])
	return nil
}

// inode reads an inode.
func (e *ext4) inode(number uint32) (*inode, error) {
	if number == 0 || number > e.inodes {
		return nil, fmt.Errorf("inode %d: the file system has %d", number, e.inodes)
	}
	group, index := uint64((number-1)/e.perGroup), int64((number-1)%e.perGroup)
	desc := make([]byte, e.descSize)
	perBlock := uint64(e.blockSize / e.descSize)
	if err := e.at(desc, e.descBlock(group/perBlock, perBlock), int64(group%perBlock)*e.descSize); err != nil {
		return nil, fmt.Errorf("group %d: %w", group, err)
	}
	le := binary.LittleEndian
	table := uint64(le.Uint32(desc[8:]))
	if e.wide {
		table |= uint64(le.Uint32(desc[0x28:])) << 32
	}
	b := make([]byte, e.inodeSize)
	off := index * e.inodeSize
	if table > e.blocks {
		return nil, fmt.Errorf("group %d: its inodes are at block %d of %d", group, table, e.blocks)
	}
	if err := e.at(b, table+uint64(off/e.blockSize), off%e.blockSize); err != nil {
		return nil, fmt.Errorf("inode %d: %w", number, err)
	}
	i := &inode{number: number, mode: le.Uint16(b), size: int64(le.Uint32(b[4:])), flags: le.Uint32(b[0x20:])}
	if i.mode&0xf000 == 0x8000 || i.mode&0xf000 == 0x4000 {
		i.size |= int64(le.Uint32(b[0x6c:])) << 32
	}
	if i.size < 0 {
		return nil, fmt.Errorf("inode %d: a file of %d bytes", number, uint64(i.size))
	}
	copy(i.block[:], b[0x28:])
	if len(b) > 128+4 {
		if extra := int(le.Uint16(b[0x80:])); 128+extra+4 <= len(b) {
			i.tail = b[128+extra:]
		}
	}
	return i, nil
}

// descBlock is where a block of group descriptors is. With meta_bg each group of groups has
// its own.
func (e *ext4) descBlock(n, perBlock uint64) uint64 {
	super := 1024 / uint64(e.blockSize) // the block that has it
	if !e.metaBG || n < e.firstMeta {
		return super + 1 + n
	}
	group := n * perBlock
	at := e.firstBlock + group*e.blocksIn
	if hasSuper(group) {
		at++
	}
	if group == 0 && super > e.firstBlock {
		at++
	}
	return at
}

// hasSuper says whether a group begins with a copy of the superblock: 0, 1 and the powers
// of 3, 5 and 7.
func hasSuper(group uint64) bool {
	if group <= 1 {
		return true
	}
	for _, base := range []uint64{3, 5, 7} {
		for n := base; n <= group; n *= base {
			if n == group {
				return true
			}
		}
	}
	return false
}

// find returns the inode of a path without symbolic links.
func (e *ext4) find(name string) (*inode, error) {
	if n, ok := e.known[name]; ok {
		return e.inode(n)
	}
	if name == "/" {
		return e.inode(rootInode)
	}
	dir, err := e.find(path.Dir(name))
	if err != nil {
		return nil, err
	}
	n, err := e.lookup(dir, path.Base(name))
	if err != nil {
		return nil, err
	}
	if len(e.known) < 1<<12 {
		e.known[name] = n
	}
	return e.inode(n)
}

// lookup finds a name in a directory.
func (e *ext4) lookup(dir *inode, name string) (found uint32, err error) {
	err = e.entries(dir, func(n string, number uint32) bool {
		if n == name {
			found = number
		}
		return found == 0
	})
	if err == nil && found == 0 {
		err = fs.ErrNotExist
	}
	return found, err
}

// entries calls f for the entries of a directory until it returns false.
func (e *ext4) entries(dir *inode, f func(name string, number uint32) bool) error {
	if dir.mode&0xf000 != 0x4000 {
		return fs.ErrNotExist
	}
	if dir.flags&inodeCrypt != 0 {
		return errors.New("it is encrypted")
	}
	if dir.flags&inodeInline != 0 {
		// The parent's number, entries, and more entries in the attribute.
		more := dir.attribute()
		if walk(dir.block[4:], f) {
			walk(more, f)
		}
		return nil
	}
	if dir.size > maxDirectory {
		return fmt.Errorf("a directory of %d bytes: expected at most %d", dir.size, maxDirectory)
	}
	r := e.reader(dir)
	b := make([]byte, e.blockSize)
	for {
		_, err := io.ReadFull(r, b)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if !walk(b, f) {
			return nil
		}
	}
}

// walk calls f for the entries in a block.
func walk(b []byte, f func(string, uint32) bool) bool {
	le := binary.LittleEndian
	for len(b) >= 12 {
		length, n := int(le.Uint16(b[4:])), int(b[6])
		if length == 0 || length == 0xffff {
			length = len(b) // as blocks of 64 KiB have it
		}
		if length < 8 || length > len(b) || 8+n > length {
			return true // damaged, or the end of what is inline
		}
		if number := le.Uint32(b); number != 0 && n > 0 {
			if name := string(b[8 : 8+n]); name != "." && name != ".." && !f(name, number) {
				return false
			}
		}
		b = b[length:]
	}
	return true
}

// attribute returns what of inline data did not fit: the attribute system.data.
func (i *inode) attribute() []byte {
	le := binary.LittleEndian
	b := i.tail
	const system = 7
	if len(b) < 4 || le.Uint32(b) != 0xea020000 {
		return nil
	}
	b = b[4:]
	for e := b; len(e) >= 16 && le.Uint32(e) != 0; {
		n, index, off, size := int(e[0]), e[1], int(le.Uint16(e[2:])), int(le.Uint32(e[8:]))
		if 16+n > len(e) {
			return nil
		}
		if index == system && string(e[16:16+n]) == "data" {
			if off > len(b) || size < 0 || size > len(b)-off {
				return nil
			}
			return b[off : off+size]
		}
		step := (16 + n + 3) &^ 3
		if step > len(e) {
			return nil
		}
		e = e[step:]
	}
	return nil
}

// Lstat implements [fileSystem].
func (e *ext4) Lstat(name string) (info, error) {
	i, err := e.find(name)
	if err != nil {
		return info{}, err
	}
	mode := fs.ModeIrregular
	switch i.mode & 0xf000 {
	case 0x8000:
		mode = 0
	case 0x4000:
		mode = fs.ModeDir
	case 0xa000:
		mode = fs.ModeSymlink
	}
	return info{size: i.size, mode: mode}, nil
}

// Readlink implements [fileSystem].
func (e *ext4) Readlink(name string) (string, error) {
	i, err := e.find(name)
	if err != nil {
		return "", err
	}
	if i.flags&inodeCrypt != 0 {
		return "", errors.New("it is encrypted")
	}
	if i.size > maxPath {
		return "", fmt.Errorf("a symbolic link of %d bytes", i.size)
	}
	if i.size < 60 && i.flags&(inodeExtents|inodeInline) == 0 { // in the place of the block map
		return string(i.block[:i.size]), nil
	}
	b := make([]byte, i.size)
	_, err = io.ReadFull(e.reader(i), b)
	return string(b), err
}

// List implements [fileSystem].
func (e *ext4) List(name string) (names []string, err error) {
	i, err := e.find(name)
	if err != nil {
		return nil, err
	}
	return names, e.entries(i, func(n string, _ uint32) bool {
		names = append(names, n)
		return true
	})
}

// Open implements [fileSystem].
func (e *ext4) Open(name string) (io.Reader, error) {
	i, err := e.find(name)
	if err != nil {
		return nil, err
	}
	if i.flags&inodeCrypt != 0 {
		return nil, errors.New("it is encrypted")
	}
	return e.reader(i), nil
}
