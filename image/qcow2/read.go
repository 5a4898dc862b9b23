package qcow2

import (
	"errors"
	"fmt"
	"io"
)

// Source is an image below another one: what the upper one lacks is read from it.
type Source interface {
	io.ReaderAt
	// Size is the size of its disk in bytes.
	Size() int64
	// Extent tells how many of the bytes from off on are alike: known to be zeros, or not.
	// At least one, and none behind the end of the disk. off is inside the disk.
	Extent(off int64) (n int64, zeros bool, err error)
}

var _ Source = (*Image)(nil)

// Image is an image that is open for reading.
type Image struct {
	Header
	tables  tables
	backing Source // nil: none
	inflate inflater
}

// New opens the image in a file of fileSize bytes. backing is the image that its header
// names, which the caller has opened (see [ParseHeader]); nil: what is not in the file is
// zeros, which is an error if the header names one.
func New(r io.ReaderAt, fileSize int64, backing Source) (*Image, error) {
	h, err := ParseHeader(r, fileSize)
	if err != nil {
		return nil, err
	}
	if h.Backing != "" && backing == nil {
		return nil, refused("it has a backing file, %.200q, that is not open", h.Backing)
	}
	im := &Image{Header: *h, tables: tables{r: r, size: fileSize, piece: pieceSize(h.ClusterBits), kept: map[int64][]byte{}}}
	if h.Backing != "" {
		im.backing = backing
	}
	im.inflate.init(h)
	return im, nil
}

// Size implements [Source].
func (im *Image) Size() int64 { return im.DiskSize }

// ReadAt implements [io.ReaderAt] for the bytes of the disk.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at offset %d", off)
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		if at >= im.DiskSize {
			return done, io.EOF
		}
		e, err := im.lookup(at)
		if err == nil {
			part := p[done:]
			part = part[:min(int64(len(part)), e.length)]
			if err = im.read(part, at, e); err == nil {
				done += len(part)
				continue
			}
		}
		return done, fmt.Errorf("read at %d of the disk: %w", at, err)
	}
	return done, nil
}

// read fills p, which is no longer than e, from e at off of the disk.
func (im *Image) read(p []byte, off int64, e extent) error {
	switch e.kind {
	case zero:
		clear(p)
	case normal:
		return readFull(im.tables.r, p, e.host)
	case compressed:
		return im.readCompressed(p, e)
	case absent:
		return im.readBacking(p, off)
	}
	return nil
}

func (im *Image) readBacking(p []byte, off int64) error {
	n := 0
	if im.backing != nil {
		n = int(max(0, min(int64(len(p)), im.backing.Size()-off)))
		if err := readFull(im.backing, p[:n], off); err != nil {
			return err
		}
	}
	clear(p[n:])
	return nil
}

// readFull fills p; what is behind the end of r is zeros.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	clear(p[n:])
	return nil
}

// Extent implements [Source].
func (im *Image) Extent(off int64) (int64, bool, error) {
	if off < 0 || off >= im.DiskSize {
		return 0, false, fmt.Errorf("the extent at %d of a disk of %d bytes", off, im.DiskSize)
	}
	e, err := im.lookup(off)
	switch {
	case err != nil:
		return 0, false, err
	case e.kind == zero:
		return e.length, true, nil
	case e.kind != absent:
		return e.length, false, nil
	case im.backing == nil || off >= im.backing.Size():
		return e.length, true, nil
	}
	n, zeros, err := im.backing.Extent(off)
	return min(n, e.length), zeros, err
}
