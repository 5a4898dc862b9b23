package image

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// maxBlocks is how many blocks a stream of xz may have: the package keeps a record of each.
const maxBlocks = 1 << 20

// xzReader decompresses xz. Memory is taken as each block says: the package takes what is
// configured for the least, and bounds nothing.
func xzReader(in *bufio.Reader) (io.ReadCloser, error) {
	x := &xzBlocks{in: in}
	x.next = x.stream
	r, err := xz.ReaderConfig{DictCap: lzma.MinDictCap}.NewReader(x)
	return io.NopCloser(r), err
}

// xzBlocks passes a file of xz on, and looks at the header of each block before that (The
// .xz File Format, 2 to 4). What is too short, or has wrong sums, is the package's to report.
type xzBlocks struct {
	in    *bufio.Reader
	pass  int64        // bytes that are passed before next
	next  func() error // looks at what follows, and sets pass and next
	check int64        // the size of a block's check
	size  int64        // of the block or the index so far, for its padding
	count uint64       // blocks of this stream, or records of its index that follow
}

// Read implements io.Reader.
func (x *xzBlocks) Read(p []byte) (int, error) {
	for x.pass == 0 {
		if err := x.next(); err != nil {
			return 0, err
		}
	}
	n, err := x.in.Read(p[:min(int64(len(p)), x.pass)])
	x.pass -= int64(n)
	return n, err
}

// peek returns the next n bytes; nil: there are fewer, which are all passed.
func (x *xzBlocks) peek(n int) ([]byte, error) {
	p, err := x.in.Peek(n)
	if errors.Is(err, io.EOF) {
		x.pass = math.MaxInt64
		return nil, nil
	}
	return p, err
}

// stream is at the beginning of a stream, or at the padding before one.
func (x *xzBlocks) stream() error {
	if p, err := x.peek(4); p == nil || bytes.Equal(p, make([]byte, 4)) {
		if p != nil {
			x.pass = 4
		}
		return err
	}
	p, err := x.peek(12)
	if p == nil {
		return err
	}
	x.pass, x.next, x.count = 12, x.block, 0
	if kind := int64(p[7] & 15); kind == 0 {
		x.check = 0
	} else {
		x.check = 4 << ((kind - 1) / 3)
	}
	return nil
}

// block is at the header of a block, or at the index.
func (x *xzBlocks) block() error {
	p, err := x.peek(1)
	if p == nil {
		return err
	}
	if p[0] == 0 {
		x.pass, x.size, x.next = 1, 1, x.index
		return nil
	}
	n := 4 * (int(p[0]) + 1)
	if p, err = x.peek(n); p == nil {
		return err
	}
	if x.count++; x.count > maxBlocks {
		return fmt.Errorf("xz: expected at most %d blocks", maxBlocks)
	}
	x.pass, x.size, x.next = int64(n), 0, x.chunk
	return xzWindow(p)
}

// chunk is at a chunk of LZMA2: a byte that says which, what it has of sizes and properties,
// and its data.
func (x *xzBlocks) chunk() error {
	p, err := x.peek(1)
	if p == nil {
		return err
	}
	switch kind := p[0]; {
	case kind == 0: // the last
		x.pass, x.next = 1+(-(x.size+1))&3+x.check, x.block
		return nil
	case kind <= 2:
		if p, err = x.peek(3); p != nil {
			x.pass = 3 + int64(binary.BigEndian.Uint16(p[1:])) + 1
		}
	case kind < 0x80:
		return fmt.Errorf("xz: a chunk of LZMA2 begins with %#x", kind)
	default:
		if p, err = x.peek(5); p != nil {
			x.pass = 5 + int64(kind>>6&1) + int64(binary.BigEndian.Uint16(p[3:])) + 1
		}
	}
	x.size += x.pass
	return err
}

// index is at the number of records of the index.
func (x *xzBlocks) index() error {
	n, err := x.number(0)
	x.count, x.size, x.next = n, x.size+x.pass, x.record
	return err
}

// record is at a record of the index, or at the end of the stream.
func (x *xzBlocks) record() error {
	if x.count == 0 {
		x.pass, x.next = -x.size&3+4+12, x.stream
		return nil
	}
	x.count--
	_, err := x.number(0)
	if first := x.pass; err == nil && first < math.MaxInt64 {
		if _, err = x.number(int(first)); x.pass < math.MaxInt64 {
			x.pass += first
		}
	}
	x.size += x.pass
	return err
}

// number reads a number that begins so many bytes later, and sets pass to its length.
func (x *xzBlocks) number(later int) (uint64, error) {
	for n := 1; n <= binary.MaxVarintLen64; n++ {
		p, err := x.peek(later + n)
		if p == nil {
			return 0, err
		}
		if p[later+n-1] < 0x80 {
			v, k := binary.Uvarint(p[later:])
			if x.pass = int64(k); k != n {
				break
			}
			return v, nil
		}
	}
	return 0, errors.New("xz: a number of the index is too large")
}

// xzWindow checks how far back a block refers, which its header says with a filter of LZMA2
// (3.1 and 5.3.1).
func xzWindow(header []byte) error {
	const filterLZMA2 = 0x21
	at := 2
	for flag := byte(0x40); flag != 0; flag <<= 1 { // of two sizes, that may be there
		if header[1]&flag != 0 {
			_, n := binary.Uvarint(header[min(at, len(header)):])
			at += max(n, 1)
		}
	}
	if len(header) < at+3 || header[1]&3 != 0 || header[at] != filterLZMA2 || header[at+1] != 1 || header[at+2] > 40 {
		return errors.New("xz: a block has other filters than LZMA2 (xz -d decompresses it)")
	}
	size := int64(2|header[at+2]&1) << (header[at+2]/2 + 11)
	if size > maxWindow {
		return fmt.Errorf("it refers back %d MiB: expected at most %d MiB", size>>20, maxWindow>>20)
	}
	return nil
}
