package image

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// maxWindow is how much memory decompression may take for what a file refers back to:
// zstd --long=27 and xz -9 need less, or as much.
const maxWindow = 128 << 20

// decompress reads what is in a compressed file, from its beginning.
func decompress(f *os.File, compression string) (io.ReadCloser, error) {
	return decompressFrom(io.NewSectionReader(f, 0, 1<<63-1), compression)
}

func decompressFrom(r io.Reader, compression string) (io.ReadCloser, error) {
	in := bufio.NewReaderSize(r, 1<<20)
	var out io.ReadCloser
	var err error
	switch compression {
	case "gzip":
		out, err = gzip.NewReader(in)
	case "xz":
		out, err = xzReader(in)
	case "zstd":
		var z *zstd.Decoder
		z, err = zstd.NewReader(in, zstd.WithDecoderMaxWindow(maxWindow))
		if err == nil {
			out = z.IOReadCloser()
		}
	default:
		err = fmt.Errorf("compression %q is not known", compression)
	}
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	return named{out}, nil
}

// xzReader decompresses xz. Memory is taken as the first block says: the package takes what
// is configured for the least, and bounds nothing.
func xzReader(in *bufio.Reader) (io.ReadCloser, error) {
	const streamHeader = 12
	head, err := in.Peek(streamHeader + 1)
	if err == nil {
		head, err = in.Peek(streamHeader + 4*(int(head[streamHeader])+1))
	}
	if err == nil {
		err = xzWindow(head[streamHeader:])
	}
	if err != nil && !errors.Is(err, io.EOF) { // what is too short is the package's to report
		return nil, err
	}
	x, err := xz.ReaderConfig{DictCap: lzma.MinDictCap}.NewReader(in)
	return io.NopCloser(x), err
}

// xzWindow checks how far back a block of xz refers, which its header says with a filter
// of LZMA2 (The .xz File Format, 3.1 and 5.3.1).
func xzWindow(header []byte) error {
	const filterLZMA2 = 0x21
	at := 2
	for flag := byte(0x40); flag != 0; flag <<= 1 { // of two sizes, that may be there
		if len(header) > 1 && header[1]&flag != 0 {
			_, n := binary.Uvarint(header[min(at, len(header)):])
			at += max(n, 1)
		}
	}
	if len(header) < at+3 || header[at] != filterLZMA2 || header[at+1] != 1 || header[at+2] > 40 {
		return nil // no block, or another filter, which the package refuses
	}
	size := int64(2|header[at+2]&1) << (header[at+2]/2 + 11)
	if size > maxWindow {
		return fmt.Errorf("it refers back %d MiB: expected at most %d MiB", size>>20, maxWindow>>20)
	}
	return nil
}

// named says in errors that they are of the decompression.
type named struct{ io.ReadCloser }

func (n named) Read(p []byte) (int, error) {
	k, err := n.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("decompress: %w", err)
	}
	return k, err
}
