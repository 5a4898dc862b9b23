// Package image opens the images of disks for reading, and makes raw disks of them.
//
// An image is raw (the bytes of the disk one after another) or qcow2. Which of the two is
// said by who owns it, and never found out from what is in it, unless its owner asks for
// that with [Detect]: a guest can write anything into its first sector.
//
//	im, err := image.Open("debian.qcow2", image.QCOW2)
//	n, err := im.ReadAt(p, off)
//
// Package image is below virtio/blk, which reads such images for a guest, and knows nothing
// of virtual machines.
package image

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/govmm/govmm/image/qcow2"
	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"golang.org/x/sys/unix"
)

// Format is how the bytes of a disk lie in a file.
type Format string

// The formats that are known.
const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
)

// ParseFormat reads a format's name.
func ParseFormat(s string) (Format, error) {
	switch f := Format(s); f {
	case Raw, QCOW2:
		return f, nil
	}
	return "", fmt.Errorf("format %.40q: expected raw or qcow2", s)
}

// Reader is a disk that is open for reading. Several goroutines may use it at once.
type Reader interface {
	// ReadAt reads bytes of the disk.
	io.ReaderAt
	// Size is the size of the disk in bytes. It need not be a multiple of a sector.
	Size() int64
	// Extent tells how many of the bytes from off on are alike: known to be zeros, or not
	// known. At least one, and none behind the end of the disk. off is inside the disk.
	Extent(off int64) (n int64, zeros bool, err error)
	// Close closes its files.
	Close() error
}

// Open opens the image in a file, or a block device, for reading. A qcow2 image may have
// backing files, which lie in the same directory: see [qcow2.Header]. Errors name the file.
//
// What an image says is bounded and checked: Open and Reader may be used on files that
// nobody vouches for.
func Open(path string, format Format) (Reader, error) {
	if _, err := ParseFormat(string(format)); err != nil {
		return nil, fmt.Errorf("image %s: %w", path, err)
	}
	f, err := openFile(unix.AT_FDCWD, path, 0)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", path, err)
	}
	return OpenFile(f, path, format)
}

// OpenFile is [Open] of a file that is open already. path is its name for errors, and
// says where backing files lie. The file is closed with the reader, or now if there is an error.
func OpenFile(f *os.File, path string, format Format) (Reader, error) {
	c := chain{path: path}
	r, err := c.open(f, path, format)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("image %s: %w", path, err), c.close())
	}
	return r, nil
}

// openFile opens a file that is a regular one or a block device; it waits for nothing.
func openFile(dir int, path string, flags int) (*os.File, error) {
	fd, err := unix.Openat(dir, path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY|flags, 0)
	for errors.Is(err, unix.EINTR) {
		fd, err = unix.Openat(dir, path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY|flags, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG && st.Mode&unix.S_IFMT != unix.S_IFBLK {
		err = errors.New("neither a file nor a block device")
	}
	if err == nil {
		err = unix.SetNonblock(fd, false) // it was for what is no file
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// raw is a file with the bytes of the disk.
type raw struct {
	*os.File
	size  int64
	files chain
}

func openRaw(f *os.File, files chain) (*raw, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("find its size: %w", err)
	}
	return &raw{f, size, files}, nil
}

// Size implements [Reader].
func (r *raw) Size() int64 { return r.size }

// Extent implements [Reader]: a hole of the file is zeros.
func (r *raw) Extent(off int64) (int64, bool, error) {
	if off < 0 || off >= r.size {
		return 0, false, fmt.Errorf("the extent at %d of a disk of %d bytes", off, r.size)
	}
	fd := int(r.Fd())
	data, err := unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // a hole up to the end
		return r.size - off, true, nil
	case err != nil: // the file system does not know, or a device
		return r.size - off, false, nil
	case data > off:
		return min(data, r.size) - off, true, nil
	}
	hole, err := unix.Seek(fd, off, unix.SEEK_HOLE)
	if err != nil || hole <= off {
		return r.size - off, false, nil
	}
	return min(hole, r.size) - off, false, nil
}

// Close implements [Reader].
func (r *raw) Close() error { return r.files.close() }

func (r *raw) lock() error { return r.files.lock() }

// layered is a qcow2 image with what is below it.
type layered struct {
	*qcow2.Image
	files chain
	name  string // of its own file
	below Reader // its backing file; nil: none
}

// Close implements [Reader].
func (l *layered) Close() error { return l.files.close() }

func (l *layered) lock() error { return l.files.lock() }
