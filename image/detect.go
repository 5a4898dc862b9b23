package image

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Kind is what a file is: a format, and what it is compressed with.
type Kind struct {
	Format      Format
	Compression string // gzip, xz or zstd; "": none
	// Guessed says that Format was found by what the file begins with.
	Guessed bool
}

// String names the kind for people.
func (k Kind) String() string {
	if k.Compression == "" {
		return string(k.Format)
	}
	return string(k.Format) + " in " + k.Compression
}

// compressions are file names' endings, and what they stand for.
var compressions = []struct{ ending, name string }{{".gz", "gzip"}, {".xz", "xz"}, {".zst", "zstd"}, {".zstd", "zstd"}}

// ofName is what a file's name says: its owner chose it, and a guest cannot change it.
func ofName(path string) (k Kind) {
	path = strings.ToLower(path)
	for _, c := range compressions {
		if rest, ok := strings.CutSuffix(path, c.ending); ok {
			k.Compression, path = c.name, rest
			break
		}
	}
	switch {
	case strings.HasSuffix(path, ".raw"):
		k.Format = Raw
	case strings.HasSuffix(path, ".qcow2"):
		k.Format = QCOW2
	}
	return k
}

// FormatOfName returns the format that a file's name ends with, .raw or .qcow2; "": neither.
func FormatOfName(path string) Format {
	if k := ofName(path); k.Compression == "" {
		return k.Format
	}
	return ""
}

// Detect says what the file of an image is, for commands whose user names a file and
// wants it to be read as what it is. format is what the user said; "": nothing. Then a name
// that ends in .raw or .qcow2 decides, and only then what the file begins with. What is
// compressed with gzip, xz or zstd is found in the same way, but a file named .raw, or
// called raw by its user, is compressed only if its name says so.
//
// An image whose format was guessed may have no backing file: else a guest could have a
// file of its host read, by writing a header to its raw disk. A file in a format that this
// package does not read is refused.
func Detect(f *os.File, path string, format Format) (Kind, error) {
	k, head, err := detect(f, path, format)
	if err == nil && k.Compression == "" {
		err = k.settle(head)
	}
	if err == nil && k.Compression != "" {
		var r io.ReadCloser
		if r, err = decompress(f, k.Compression); err == nil {
			inner := make([]byte, ProbeBytes)
			n, readErr := io.ReadFull(r, inner)
			if readErr != nil && !errors.Is(readErr, io.ErrUnexpectedEOF) && !errors.Is(readErr, io.EOF) {
				err = readErr
			} else {
				err = k.settle(inner[:n])
			}
			_ = r.Close() // read only; it repeats the error
		}
	}
	if err != nil {
		return k, fmt.Errorf("image %s: %w", path, err)
	}
	return k, nil
}

// detect is Detect without a look at what is compressed. It returns how the file begins.
func detect(f *os.File, path string, format Format) (Kind, []byte, error) {
	k := ofName(path)
	if format != "" {
		var err error
		if k.Format, err = ParseFormat(string(format)); err != nil {
			return k, nil, err
		}
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return k, nil, fmt.Errorf("find its size: %w", err)
	}
	var ends [2][]byte
	for i, off := range []int64{0, max(0, size-ProbeBytes)} {
		p := make([]byte, ProbeBytes)
		n, err := f.ReadAt(p, off)
		if err != nil && !errors.Is(err, io.EOF) {
			return k, nil, fmt.Errorf("read its format: %w", err)
		}
		ends[i] = p[:n]
	}
	head := ends[0]
	if k.Format == Raw {
		return k, head, nil
	}
	switch found := Sniff(head, ends[1]); found {
	case "gzip", "xz", "zstd":
		k.Compression = found
	case "", "qcow2":
		k.Compression = ""
	default:
		return k, nil, fmt.Errorf("its format is %s, which is not known here; qemu-img convert -O raw makes a raw image", found)
	}
	return k, head, nil
}

// settle decides the format of a disk that begins with head, if it is not known.
func (k *Kind) settle(head []byte) error {
	found := Sniff(head, nil)
	switch {
	case k.Format != "":
	case found == "" || found == "qcow2":
		k.Guessed, k.Format = true, Raw
		if found == "qcow2" {
			k.Format = QCOW2
		}
	default:
		return fmt.Errorf("what is compressed in it is %s, which is not known here", found)
	}
	return nil
}

// openFor opens a file that a user has named.
func openFor(path string) (*os.File, error) {
	f, err := openFile(unix.AT_FDCWD, path, 0)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", path, err)
	}
	return f, nil
}
