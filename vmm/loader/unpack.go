package loader

import (
	"bytes"
	"compress/bzip2"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"
)

// maxWindow is the largest window or dictionary of a compressed kernel in bytes:
// that of zstd -22, the largest in Linux's build.
const maxWindow = 128 << 20

// errUnknownCompression: the loader has no decompressor for the payload's format, such
// as LZO. Only the kernel itself can unpack it.
var errUnknownCompression = errors.New("unknown compression format")

// compression is a compression format of kernels (scripts/Makefile.lib in Linux).
type compression struct {
	name  string
	magic string
	// open returns a reader of the unpacked content of r, at most size bytes.
	open func(r io.Reader, size uint64) (io.Reader, error)
	// sized says that Linux's build appends the size in 4 bytes to the
	// compressor's output. gzip's format ends with the same 4 bytes.
	sized bool
}

var compressions = []compression{
	{"gzip", "\x1f\x8b", openGzip, false},
	{"xz", "\xfd7zXZ\x00", newXZReader, true},
	{"zstd", "\x28\xb5\x2f\xfd", openZstd, true},
	{"lz4", "\x02\x21\x4c\x18", func(r io.Reader, _ uint64) (io.Reader, error) { return lz4.NewReader(r), nil }, true},
	{"lzma", "\x5d\x00\x00", openLZMA, true},
	{"bzip2", "BZh", func(r io.Reader, _ uint64) (io.Reader, error) { return bzip2.NewReader(r), nil }, true},
}

// unpack returns the content of a bzImage's payload, which may have at most
// limit bytes. The error is errUnknownCompression if there is no decompressor.
func unpack(payload []byte, limit uint64) ([]byte, error) {
	for _, c := range compressions {
		if !bytes.HasPrefix(payload, []byte(c.magic)) {
			continue
		}
		out, err := c.unpack(payload, limit)
		if err != nil {
			return nil, fmt.Errorf("unpack %d bytes of %s: %w", len(payload), c.name, err)
		}
		return out, nil
	}
	return nil, errUnknownCompression
}

func (c *compression) unpack(payload []byte, limit uint64) ([]byte, error) {
	const trailer = 4
	if len(payload) < len(c.magic)+trailer {
		return nil, io.ErrUnexpectedEOF
	}
	body, end := payload, payload[len(payload)-trailer:]
	if c.sized {
		body = payload[:len(payload)-trailer]
	}
	size := uint64(binary.LittleEndian.Uint32(end))
	if size > limit {
		return nil, fmt.Errorf("unpacked size must be at most %d bytes, the smaller of the guest's RAM and the size in the header, found %d", limit, size)
	}
	r, err := c.open(bytes.NewReader(body), size)
	if err != nil {
		return nil, err
	}
	if closer, ok := r.(io.Closer); ok {
		defer func() { _ = closer.Close() }()
	}
	// The size comes from the file: allocate a large one only as content arrives.
	var out bytes.Buffer
	if size <= 64*uint64(len(payload)) {
		out.Grow(int(size) + bytes.MinRead)
	}
	n, err := io.Copy(&out, io.LimitReader(r, int64(size)+1))
	if err != nil {
		return nil, err
	}
	if uint64(n) != size {
		return nil, fmt.Errorf("expected %d bytes of content, found %d or more", size, n)
	}
	return out.Bytes(), nil
}

func openGzip(r io.Reader, _ uint64) (io.Reader, error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	return z, nil
}

func openZstd(r io.Reader, _ uint64) (io.Reader, error) {
	d, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	return d.IOReadCloser(), nil
}

// openLZMA opens the format of the lzma tool, with a header of 13 bytes.
func openLZMA(r io.Reader, size uint64) (io.Reader, error) {
	header := make([]byte, lzma.HeaderLen)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, err
	}
	dict, err := dictionary(uint64(binary.LittleEndian.Uint32(header[1:])), size)
	if err != nil {
		return nil, err
	}
	binary.LittleEndian.PutUint32(header[1:], uint32(dict))
	return lzma.NewReader(io.MultiReader(bytes.NewReader(header), r))
}

// dictionary returns the size of the LZMA dictionary that unpacking needs: the
// packer's, but not more than the content's size.
func dictionary(dict, size uint64) (int, error) {
	if dict > maxWindow {
		return 0, fmt.Errorf("dictionary must have at most %d bytes, found %d", maxWindow, dict)
	}
	return int(max(min(dict, size), lzma.MinDictCap)), nil
}
