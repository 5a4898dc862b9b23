package migrate

import (
	"errors"
	"fmt"

	"github.com/govmm/govmm/mempage"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// Compression is how the content of pages is compressed on its way. It pays where
// the link is slower than a processor compresses.
type Compression string

// The compressions.
const (
	CompressNone Compression = "none"
	CompressZstd Compression = "zstd" // Zstandard (RFC 8878) at its fastest level
	CompressLZ4  Compression = "lz4"  // LZ4's block format: less compression, less work
)

// Codecs, in the flags of a PACKED frame.
const (
	codecZstd uint8 = 1
	codecLZ4  uint8 = 2
)

// codecFeature is the feature that a codec belongs to; "" for an unknown codec.
func codecFeature(codec uint8) string {
	switch codec {
	case codecZstd:
		return featureZstd
	case codecLZ4:
		return featureLZ4
	}
	return ""
}

// maxPlain is the most bytes of page content in one PACKED frame.
const maxPlain = maxSpan * mempage.Size

const (
	// packSpan is the most pages of a span that is compressed, a huge page. A larger one
	// would hardly become shorter, and each packer has three times its size in buffers.
	packSpan = 512
	// packersPerChannel bounds what packers take: less than 8 MiB each, so 16 MiB a channel.
	packersPerChannel = 2
)

// compressors returns how many workers compress and write for so many channels, and how
// many of them compress at one time: at most on half of the processors, so that the other
// half is the guest's.
func compressors(processors, channels int) (workers, atOnce int) {
	atOnce = max(1, processors/2)
	return min(channels+atOnce, channels*packersPerChannel), atOnce
}

// packer compresses the data pages of spans. It belongs to one goroutine.
type packer struct {
	codec  uint8
	plain  []byte
	packed []byte
	zstd   *zstd.Encoder
	lz4    lz4.Compressor
}

func newPacker(c Compression) (*packer, error) {
	const size = packSpan * mempage.Size
	p := &packer{plain: make([]byte, 0, size), packed: make([]byte, size)}
	switch c {
	case CompressLZ4:
		p.codec = codecLZ4
	case CompressZstd:
		p.codec = codecZstd
		var err error
		// No checksum: the transport has one. Frames are short, so a window of their
		// length is enough.
		p.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
			zstd.WithEncoderCRC(false), zstd.WithWindowSize(size), zstd.WithLowerEncoderMem(true))
		if err != nil {
			return nil, fmt.Errorf("prepare zstd: %w", err)
		}
	default:
		return nil, fmt.Errorf("prepare compression %q: not known", c)
	}
	return p, nil
}

// pack compresses the pages of span whose bit is set in data. It works on a copy: the
// guest may be writing them, and a compressor is not made for input that changes
// meanwhile. nil means that the result is not shorter.
func (p *packer) pack(span []byte, data []uint64) ([]byte, error) {
	p.plain = p.plain[:0]
	forRuns(data, func(start, end int) {
		p.plain = append(p.plain, span[start*mempage.Size:end*mempage.Size]...)
	})
	if len(p.plain) > len(p.packed) { // more than packSpan
		p.packed = make([]byte, len(p.plain))
	}
	var packed []byte
	switch p.codec {
	case codecZstd:
		packed = p.zstd.EncodeAll(p.plain, p.packed[:0])
	case codecLZ4:
		// If the result is not shorter: 0 bytes, or ErrInvalidSourceShortBuffer.
		n, err := p.lz4.CompressBlock(p.plain, p.packed[:len(p.plain)-1])
		if err != nil && !errors.Is(err, lz4.ErrInvalidSourceShortBuffer) {
			return nil, fmt.Errorf("compress %d bytes by LZ4: %w", len(p.plain), err)
		}
		packed = p.packed[:n]
	}
	if len(packed) == 0 || len(packed) >= len(p.plain) {
		return nil, nil
	}
	return packed, nil
}

// unpacker decompresses PACKED frames. It belongs to one goroutine.
type unpacker struct {
	plain  []byte
	packed []byte
	zstd   *zstd.Decoder
}

// room returns the buffer for the n bytes of a packed span.
func (u *unpacker) room(n int) []byte {
	if cap(u.packed) < n {
		u.packed = make([]byte, n)
	}
	return u.packed[:n]
}

// unpack decompresses the bytes that were read into room. The result must have
// exactly n bytes, at most maxPlain. No more is allocated, whatever length the packed
// bytes announce.
func (u *unpacker) unpack(codec uint8, packed []byte, n int) ([]byte, error) {
	if cap(u.plain) < n {
		u.plain = make([]byte, 0, n)
	}
	var got int
	switch codec {
	case codecZstd:
		if u.zstd == nil {
			d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(2*maxPlain),
				zstd.WithDecoderMaxWindow(maxPlain), zstd.WithDecodeAllCapLimit(true))
			if err != nil {
				return nil, fmt.Errorf("prepare zstd: %w", err)
			}
			u.zstd = d
		}
		out, err := u.zstd.DecodeAll(packed, u.plain[:0:n])
		if err != nil {
			return nil, fmt.Errorf("%w: PACKED by zstd: %v", ErrProtocol, err)
		}
		got = len(out)
	case codecLZ4:
		var err error
		if got, err = lz4.UncompressBlock(packed, u.plain[:n:n]); err != nil {
			return nil, fmt.Errorf("%w: PACKED by LZ4: %v", ErrProtocol, err)
		}
	default:
		return nil, fmt.Errorf("%w: PACKED by codec %d", ErrProtocol, codec)
	}
	if got != n {
		return nil, fmt.Errorf("%w: PACKED holds %d bytes, expected %d by its bitmaps", ErrProtocol, got, n)
	}
	return u.plain[:n], nil
}

// close frees the decoder.
func (u *unpacker) close() {
	if u.zstd != nil {
		u.zstd.Close()
	}
}
