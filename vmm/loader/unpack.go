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

// maxWindow is the largest window or dictionary in bytes that a compressed
// kernel may ask for: that of zstd -22, the most that Linux's build uses.
const maxWindow = 128 << 20

// errUnknownCompression says that a payload is of no known format. Only the
// kernel's own decompressor can unpack it (LZO, say).
var errUnknownCompression = errors.New("compressed in a way that is not known here")

// compression is one way in which kernels are compressed
// (scripts/Makefile.lib in Linux).
type compression struct {
	name  string
	magic string
	// open returns a reader of what r unpacks to, at most size bytes.
	open func(r io.Reader, size uint64) (io.Reader, error)
	// sized says that the build appended 4 bytes, the size, to what the
	// compressor made. gzip's own last 4 bytes mean the same.
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
		return nil, fmt.Errorf("%d bytes unpacked are more than the %d that the kernel's header promises or the guest has", size, limit)
	}
	r, err := c.open(bytes.NewReader(body), size)
	if err != nil {
		return nil, err
	}
	if closer, ok := r.(io.Closer); ok {
		defer func() { _ = closer.Close() }()
	}
	// Grows as content comes: the size is the file's claim.
	var out bytes.Buffer
	if size <= 64*uint64(len(payload)) {
		out.Grow(int(size) + bytes.MinRead)
	}
	n, err := io.Copy(&out, io.LimitReader(r, int64(size)+1))
	if err != nil {
		return nil, err
	}
	if uint64(n) != size {
		return nil, fmt.Errorf("content of another size than the %d bytes it says", size)
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

// openLZMA opens the format of the old lzma tool: 13 bytes of header.
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

// dictionary returns how large an LZMA dictionary has to be, in bytes, if the
// packer had one of dict bytes: no larger than the content.
func dictionary(dict, size uint64) (int, error) {
	if dict > maxWindow {
		return 0, fmt.Errorf("dictionary of %d bytes: at most %d are possible", dict, maxWindow)
	}
	return int(max(min(dict, size), lzma.MinDictCap)), nil
}
