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
	r, err := openRaw(f)
	if err != nil || format == Raw {
		return r, err
	}
	h, err := qcow2.ParseHeader(f, r.size)
	if err != nil {
		return nil, err
	}
	var below qcow2.Source
	if h.Backing != "" {
		if below, err = c.openBacking(h); err != nil {
			return nil, fmt.Errorf("its backing file %.200q: %w", h.Backing, err)
		}
	}
	im, err := qcow2.New(f, r.size, below)
	if err != nil {
		return nil, err
	}
	return &layered{im, *c}, nil
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
