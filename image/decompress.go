package image

import (
	"bufio"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
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

// named says in errors that they are of the decompression.
type named struct{ io.ReadCloser }

func (n named) Read(p []byte) (int, error) {
	k, err := n.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("decompress: %w", err)
	}
	return k, err
}
