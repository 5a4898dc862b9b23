package loader

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// The .xz container (https://tukaani.org/xz/xz-file-format.txt, 1.2.0). Kernels use
// its x86 filter, which the library does not have. So this package implements the
// container and the filter, and uses the library for LZMA2.
const (
	xzHeaderSize  = 12
	xzFilterLZMA2 = 0x21
	xzFilterX86   = 0x04
	xzCheckCRC32  = 1
)

// xzCheckSizes are the sizes of a block's check by its type (2.1.1.2).
var xzCheckSizes = [16]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}

// xzReader unpacks one .xz stream. It does not read the index after the last block,
// which unpacking does not need.
type xzReader struct {
	in    *countReader
	size  uint64 // largest size of the content
	check byte   // type of the blocks' check

	block   io.Reader // the block's content; nil between blocks
	started uint64    // in.n at the start of the block's compressed data
	sum     hash.Hash32
	done    bool
}

// countReader counts the bytes that are read. The library reads only what it needs
// from a reader with ReadByte.
type countReader struct {
	r *bufio.Reader
	n uint64
}

func (c *countReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += uint64(n)
	return n, err
}

func (c *countReader) ReadByte() (byte, error) {
	b, err := c.r.ReadByte()
	if err == nil {
		c.n++
	}
	return b, err
}

func newXZReader(r io.Reader, size uint64) (io.Reader, error) {
	x := &xzReader{in: &countReader{r: bufio.NewReader(r)}, size: size}
	var h [xzHeaderSize]byte
	if _, err := io.ReadFull(x.in, h[:]); err != nil {
		return nil, err
	}
	if h[6] != 0 || h[7]&0xf0 != 0 || crc32.ChecksumIEEE(h[6:8]) != binary.LittleEndian.Uint32(h[8:]) {
		return nil, errors.New("damaged xz stream header")
	}
	x.check = h[7]
	return x, nil
}

func (x *xzReader) Read(p []byte) (int, error) {
	for {
		if x.done {
			return 0, io.EOF
		}
		if x.block == nil {
			if err := x.nextBlock(); err != nil {
				return 0, noEOF(err)
			}
			continue
		}
		n, err := x.block.Read(p)
		x.sum.Write(p[:n])
		if err == io.EOF {
			if err = x.endBlock(); err == nil && n == 0 && len(p) > 0 {
				continue
			}
		}
		return n, noEOF(err)
	}
}

// noEOF converts io.EOF inside the container to io.ErrUnexpectedEOF.
func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// nextBlock reads a block header (3.1), or detects the index.
func (x *xzReader) nextBlock() error {
	first, err := x.in.ReadByte()
	if err != nil {
		return err
	}
	if first == 0 {
		x.done = true
		return nil
	}
	h := make([]byte, (int(first)+1)*4)
	h[0] = first
	if _, err := io.ReadFull(x.in, h[1:]); err != nil {
		return err
	}
	body := h[:len(h)-4]
	if crc32.ChecksumIEEE(body) != binary.LittleEndian.Uint32(h[len(body):]) {
		return errors.New("damaged xz block header")
	}
	dict, x86, err := parseXZFilters(body, x.size)
	if err != nil {
		return err
	}
	x.started = x.in.n
	content, err := lzma.Reader2Config{DictCap: dict}.NewReader2(x.in)
	if err != nil {
		return err
	}
	x.block, x.sum = content, crc32.NewIEEE()
	if x86 {
		x.block = newX86Reader(content)
	}
	return nil
}

// parseXZFilters parses the filter chain of a block header: LZMA2, optionally after
// the x86 filter.
func parseXZFilters(h []byte, content uint64) (dict int, x86 bool, err error) {
	damaged := errors.New("damaged xz block header")
	flags, rest := h[1], h[2:]
	number := func() (uint64, bool) {
		v, n := binary.Uvarint(rest)
		if n <= 0 {
			return 0, false
		}
		rest = rest[n:]
		return v, true
	}
	for bit := byte(0x40); bit != 0; bit <<= 1 { // compressed size, uncompressed size
		if flags&bit != 0 {
			if _, ok := number(); !ok {
				return 0, false, damaged
			}
		}
	}
	for i := range int(flags&3) + 1 {
		id, ok1 := number()
		size, ok2 := number()
		if !ok1 || !ok2 || size > uint64(len(rest)) {
			return 0, false, damaged
		}
		properties := rest[:size]
		rest = rest[size:]
		switch {
		case id == xzFilterX86 && i == 0 && size == 0:
			x86 = true
		case id == xzFilterLZMA2 && i == int(flags&3) && size == 1:
			dict, err = xzDictionary(properties[0], content)
		default:
			err = fmt.Errorf("unsupported xz filter %#x with %d bytes of properties", id, size)
		}
		if err != nil {
			return 0, false, err
		}
	}
	if dict == 0 {
		return 0, false, damaged
	}
	return dict, x86, nil
}

// xzDictionary decodes LZMA2's property byte (5.3.1).
func xzDictionary(b byte, content uint64) (int, error) {
	if b > 40 {
		return 0, errors.New("damaged xz block header")
	}
	return dictionary(uint64(2|b&1)<<(b/2+11), content)
}

// endBlock reads the padding and the check after a block's data.
func (x *xzReader) endBlock() error {
	for (x.in.n-x.started)%4 != 0 {
		if _, err := x.in.ReadByte(); err != nil {
			return err
		}
	}
	check := make([]byte, xzCheckSizes[x.check])
	if _, err := io.ReadFull(x.in, check); err != nil {
		return err
	}
	if x.check == xzCheckCRC32 && binary.LittleEndian.Uint32(check) != x.sum.Sum32() {
		return errors.New("wrong CRC: the file is damaged")
	}
	x.block = nil
	return nil
}
