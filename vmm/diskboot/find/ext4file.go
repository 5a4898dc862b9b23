package find

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	maxDepth    = 5 // of an extent tree, as the kernel has it
	extentMagic = 0xf30a
	maxExtent   = 1 << 15 // blocks; a longer one is not written yet, and reads as zeros
)

// run is a part of a file: n blocks from block on, or zeros.
type run struct {
	block uint64
	n     uint64
	zero  bool
}

// ext4Reader reads a file from its beginning.
type ext4Reader struct {
	e   *ext4
	i   *inode
	off int64
	run run // from off on, which is then at the beginning of a block
	// node is the last block of the tree or map at each height, so that a long file does
	// not read them again and again.
	nodes map[uint64][]byte
}

func (e *ext4) reader(i *inode) io.Reader {
	return &ext4Reader{e: e, i: i, nodes: make(map[uint64][]byte)}
}

// Read implements [io.Reader].
func (r *ext4Reader) Read(p []byte) (n int, err error) {
	left := r.i.size - r.off
	if left <= 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), left)]
	if r.i.flags&inodeInline != 0 {
		data := append(r.i.block[:], r.i.attribute()...)
		if r.off >= int64(len(data)) {
			return 0, fmt.Errorf("inode %d: %d bytes are inline, expected %d", r.i.number, len(data), r.i.size)
		}
		n = copy(p, data[r.off:])
		r.off += int64(n)
		return n, nil
	}
	size := r.e.blockSize
	within := r.off % size
	if r.run.n == 0 {
		if r.run, err = r.find(uint64(r.off / size)); err != nil {
			return 0, fmt.Errorf("inode %d: %w", r.i.number, err)
		}
	}
	if r.run.n == 0 {
		return 0, fmt.Errorf("inode %d: no extent at %d", r.i.number, r.off)
	}
	whole := int64(min(r.run.n, 1<<20)) * size // no overflow
	p = p[:min(int64(len(p)), whole-within, readMost)]
	if within > 0 || int64(len(p)) < size { // a part of a block
		b := make([]byte, size)
		p = p[:min(int64(len(p)), size-within)]
		if !r.run.zero {
			if err := r.e.readBlocks(b, r.run.block); err != nil {
				return 0, err
			}
		}
		copy(p, b[within:])
	} else {
		p = p[:int64(len(p))/size*size]
		if r.run.zero {
			clear(p)
		} else if err := r.e.readBlocks(p, r.run.block); err != nil {
			return 0, err
		}
	}
	r.off += int64(len(p))
	passed := uint64((within + int64(len(p))) / size)
	r.run.n -= passed
	if !r.run.zero {
		r.run.block += passed
	}
	return len(p), nil
}

// find returns the run that begins at a block of the file.
func (r *ext4Reader) find(block uint64) (run, error) {
	if r.i.flags&inodeExtents != 0 {
		return r.extent(block)
	}
	return r.mapped(block)
}

// node reads a block of the tree or map.
func (r *ext4Reader) node(block uint64) ([]byte, error) {
	if b, ok := r.nodes[block]; ok {
		return b, nil
	}
	b := make([]byte, r.e.blockSize)
	if err := r.e.readBlocks(b, block); err != nil {
		return nil, err
	}
	if len(r.nodes) > 64 {
		clear(r.nodes)
	}
	r.nodes[block] = b
	return b, nil
}

// extent looks a block up in the tree of extents.
func (r *ext4Reader) extent(block uint64) (run, error) {
	le := binary.LittleEndian
	b := r.i.block[:]
	end := uint64(1) << 32 // the first block behind this node
	for depth := maxDepth + 1; ; {
		if le.Uint16(b) != extentMagic {
			return run{}, errors.New("its extents are damaged")
		}
		n, d := int(le.Uint16(b[2:])), int(le.Uint16(b[6:]))
		if d >= depth || 12+12*n > len(b) {
			return run{}, errors.New("its extents are damaged")
		}
		depth = d
		// The last one that does not begin behind the block.
		at := -1
		for k := range n {
			if first := uint64(le.Uint32(b[12+12*k:])); first <= block {
				at = k
			} else {
				end = min(end, first)
				break
			}
		}
		if at < 0 {
			return run{n: end - block, zero: true}, nil
		}
		x := b[12+12*at:]
		if d > 0 {
			next, err := r.node(uint64(le.Uint32(x[4:])) | uint64(le.Uint16(x[8:]))<<32)
			if err != nil {
				return run{}, err
			}
			b = next
			continue
		}
		first, length := uint64(le.Uint32(x)), uint64(le.Uint16(x[4:]))
		start := uint64(le.Uint32(x[8:])) | uint64(le.Uint16(x[6:]))<<32
		unwritten := length > maxExtent
		if unwritten {
			length -= maxExtent
		}
		if block >= first+length {
			return run{n: end - block, zero: true}, nil
		}
		return run{block: start + block - first, n: first + length - block, zero: unwritten}, nil
	}
}

// mapped looks a block up in the block map of ext2 and ext3: 12 direct blocks, and blocks
// of one, two and three levels.
func (r *ext4Reader) mapped(block uint64) (run, error) {
	le := binary.LittleEndian
	per := uint64(r.e.blockSize / 4)
	const direct = 12
	slots := r.i.block[:]
	at, levels, span := block, 0, uint64(1) // span: blocks of a slot
	if block >= direct {
		at -= direct
		levels, span = 1, per
		for ; at >= span; levels++ {
			if levels == 3 {
				return run{}, errors.New("it is too long for a block map")
			}
			at -= span
			span *= per
		}
		slots = slots[4*(direct+levels-1):][:4]
	}
	for ; levels > 0; levels-- {
		next := uint64(le.Uint32(slots[4*(at/span):]))
		at %= span
		if next == 0 {
			return run{n: span - at, zero: true}, nil
		}
		b, err := r.node(next)
		if err != nil {
			return run{}, err
		}
		slots, span = b, span/per
	}
	if block < direct {
		slots = slots[:4*direct]
	}
	first := uint64(le.Uint32(slots[4*at:]))
	n := uint64(1)
	for k := at + 1; int(4*k) < len(slots); k++ {
		next := uint64(le.Uint32(slots[4*k:]))
		if first == 0 && next != 0 || first != 0 && next != first+n {
			break
		}
		n++
	}
	return run{block: first, n: n, zero: first == 0}, nil
}
