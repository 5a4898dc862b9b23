package image

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/govmm/govmm/image/qcow2"
	"golang.org/x/sys/unix"
)

// maxChain is how many files an image may consist of.
const maxChain = 16

// chain is the open files of an image, from the one that was named down.
//
// A backing file's name comes from the image above it, which may come from anybody. So
// only a plain name is followed, to a regular file in the directory of the image, and not
// through a symbolic link: an image cannot name a file that its owner did not put beside it.
type chain struct {
	path  string
	files []*os.File
}

func (c *chain) close() error {
	var errs []error
	for _, f := range c.files {
		errs = append(errs, f.Close())
	}
	c.files = nil
	return errors.Join(errs...)
}

// open opens the image in a file, and what is below it. The file is closed by close.
func (c *chain) open(f *os.File, name string, format Format) (Reader, error) {
	c.files = append(c.files, f)
	if err := c.repeated(); err != nil {
		return nil, err
	}
	r, err := openRaw(f, *c)
	if err != nil {
		return nil, err
	}
	if format == Raw {
		return r, nil
	}
	h, err := qcow2.ParseHeader(f, r.size)
	if err != nil {
		return nil, err
	}
	l := &layered{name: name}
	var source qcow2.Source // not a nil Reader
	if h.Backing != "" {
		if l.below, err = c.openBacking(h); err != nil {
			return nil, fmt.Errorf("its backing file %.200q: %w", h.Backing, err)
		}
		source = l.below
	}
	if l.Image, err = qcow2.New(f, r.size, source); err != nil {
		return nil, err
	}
	l.files = *c
	return l, nil
}

// openBacking opens the backing file that a header names.
func (c *chain) openBacking(h *qcow2.Header) (Reader, error) {
	format, err := ParseFormat(h.BackingFormat)
	switch {
	case h.BackingFormat == "":
		return nil, errors.New("the image does not say its format, and it is not guessed; qemu-img rebase -u -F FORMAT writes it down")
	case err != nil:
		return nil, err
	case len(c.files) == maxChain:
		return nil, fmt.Errorf("more than %d files, one below the other", maxChain)
	}
	name := h.Backing
	if name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return nil, errors.New("expected the plain name of a file in the same directory; put it there, and qemu-img rebase -u -b NAME writes that down")
	}
	dir, err := unix.Open(filepath.Dir(c.path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open its directory: %w", err)
	}
	defer unix.Close(dir)
	f, err := openFile(dir, name, unix.O_NOFOLLOW)
	if errors.Is(err, unix.ELOOP) {
		return nil, errors.New("expected a file, found a symbolic link")
	}
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, errors.New("expected a regular file"), f.Close())
	}
	return c.open(f, name, format)
}

// ErrInUse is wrapped by the error for an image that another process writes.
var ErrInUse = errors.New("another process uses it")

// Lock takes the right to read an image: it fails with [ErrInUse] if somebody who locks it
// writes one of its files, as a VM does with its disks, and keeps them from beginning to.
// It is given up with [Reader.Close]. The lock is that of virtio/blk, and conflicts with QEMU's.
func Lock(r Reader) error {
	if l, ok := r.(interface{ lock() error }); ok {
		return l.lock()
	}
	return nil
}

func (c *chain) lock() error {
	for _, f := range c.files {
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK})
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			err = ErrInUse
		}
		if err != nil {
			return fmt.Errorf("image %s: lock: %w", f.Name(), err)
		}
	}
	return nil
}

// repeated fails if the last file is there before: the images would be below themselves.
func (c *chain) repeated() error {
	last, err := c.files[len(c.files)-1].Stat()
	if err != nil {
		return err
	}
	for _, f := range c.files[:len(c.files)-1] {
		if st, err := f.Stat(); err != nil || os.SameFile(st, last) {
			return errors.Join(err, errors.New("it is below itself"))
		}
	}
	return nil
}
