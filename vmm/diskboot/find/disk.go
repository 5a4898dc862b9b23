package find

import (
	"errors"
	"fmt"
	"io"
)

const (
	// chunkSize is what a small read brings in, and readMost what one read of the disk asks for.
	chunkSize = 64 << 10
	readMost  = 1 << 20
	// cachedChunks bounds what is kept of the disk: 8 MiB.
	cachedChunks = 128
	// maxRead bounds what one search reads of the disk, whatever its tables say: the largest
	// kernel and initial RAM disk, several times.
	maxRead = 4 << 30
)

var errReadEnough = fmt.Errorf("more than %d GiB were read, which no search needs", maxRead>>30)

// disk is the block device: it keeps what small reads have brought in, and bounds the sum of
// all reads.
type disk struct {
	from   io.ReaderAt
	size   int64
	read   int64
	chunks map[int64][]byte
	order  []int64 // of the chunks, oldest first
}

func newDisk(from io.ReaderAt, size int64) *disk {
	return &disk{from: from, size: size, chunks: make(map[int64][]byte)}
}

// ReadAt implements [io.ReaderAt].
func (d *disk) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 || off > d.size {
		return 0, fmt.Errorf("read at %d: the disk has %d bytes", off, d.size)
	}
	if left := d.size - off; int64(len(p)) > left {
		p, err = p[:left], io.EOF
	}
	for n < len(p) {
		at := off + int64(n)
		if at%chunkSize == 0 && len(p)-n >= chunkSize {
			m := min(len(p)-n, readMost)
			if err := d.fetch(p[n:n+m], at); err != nil {
				return n, err
			}
			n += m
			continue
		}
		c, err := d.chunk(at - at%chunkSize)
		if err != nil {
			return n, err
		}
		n += copy(p[n:], c[at%chunkSize:])
	}
	return n, err
}

// chunk returns the chunk at an offset.
func (d *disk) chunk(off int64) ([]byte, error) {
	if c, ok := d.chunks[off]; ok {
		return c, nil
	}
	c := make([]byte, min(chunkSize, d.size-off))
	if err := d.fetch(c, off); err != nil {
		return nil, err
	}
	if len(d.order) == cachedChunks {
		delete(d.chunks, d.order[0])
		d.order = d.order[1:]
	}
	d.chunks[off], d.order = c, append(d.order, off)
	return c, nil
}

// fetch reads all of p from the disk.
func (d *disk) fetch(p []byte, off int64) error {
	if d.read += int64(len(p)); d.read > maxRead {
		return errReadEnough
	}
	n, err := d.from.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read the disk at %d: %w", off, err)
}

// part is a range of a disk.
type part struct {
	of    io.ReaderAt
	start int64
	size  int64
}

// ReadAt implements [io.ReaderAt].
func (s *part) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > s.size {
		return 0, fmt.Errorf("read at %d: the partition has %d bytes", off, s.size)
	}
	short := false
	if left := s.size - off; int64(len(p)) > left {
		p, short = p[:left], true
	}
	n, err := s.of.ReadAt(p, s.start+off)
	if err == nil && short {
		err = io.EOF
	}
	return n, err
}
