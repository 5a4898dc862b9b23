package blk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	disks "github.com/govmm/govmm/image"
	"golang.org/x/sys/unix"
)

// overlay is what an ephemeral disk has beside its file. The file has no name, is sparse and
// as large as the disk; what the guest writes lands there at its offset. A sector that was
// written is read from the file, any other from the image.
type overlay struct {
	base    disks.Reader
	written sectors
}

// temporary is the directory of the files of ephemeral disks: not /tmp, which may be memory.
func temporary() string {
	if dir := os.Getenv("TMPDIR"); dir != "" {
		return dir
	}
	return "/var/tmp"
}

// openEphemeral opens an image to be read only, and makes the file for what is written.
func openEphemeral(c Config) (*image, error) {
	format := disks.Raw
	if c.Format != "" {
		format = c.Format
	}
	base, err := disks.Open(c.Path, format)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", c.Path, err)
	}
	im, err := newEphemeral(c, base)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("disk %s: %w", c.Path, err), base.Close())
	}
	return im, nil
}

func newEphemeral(c Config, base disks.Reader) (*image, error) {
	size := (base.Size() + SectorSize - 1) &^ (SectorSize - 1)
	if size == 0 {
		return nil, errors.New("it is empty")
	}
	if c.Format == "" && !c.Raw {
		if err := probe(c.Path, base.Size()); err != nil {
			return nil, err
		}
	}
	f, err := disks.TempFile(temporary())
	if err != nil {
		return nil, fmt.Errorf("make a file for what the guest writes (in TMPDIR, or /var/tmp): %w", err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return nil, fmt.Errorf("the file for what the guest writes: %w", err)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate a file descriptor: %w", err)
	}
	im := &image{path: c.Path, fd: fd, offsetAlign: 1, memAlign: 1, fdatasync: unix.Fdatasync, sectors: uint64(size) / SectorSize,
		over: &overlay{base: base, written: newSectors(size)}}
	im.lock.claim = -1
	im.topology = im.findTopology(maxBlock)
	return im, nil
}

// readOver fills bufs, whole sectors at off of the disk.
func (im *image) readOver(bufs [][]byte, off int64, s *scratch) error {
	for at, left := 0, int64(total(bufs)); left > 0; {
		n, written := im.over.written.run(off, left)
		s.part = slice(s.part[:0], bufs, at, int(n))
		var err error
		if written {
			err = im.transfer(unix.SYS_PREADV2, s.part, off, 0, s)
		} else {
			err = im.over.read(s.part, off)
		}
		clear(s.part) // keep no pointers to guest memory
		if err != nil {
			return err
		}
		at, off, left = at+int(n), off+n, left-n
	}
	return nil
}

// read fills bufs from the image. Its last sector may be cut.
func (o *overlay) read(bufs [][]byte, off int64) error {
	for _, b := range bufs {
		n, err := o.base.ReadAt(b, off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		clear(b[n:])
		off += int64(len(b))
	}
	return nil
}

// writeOver writes to the file, and only then notes what it has.
func (im *image) writeOver(bufs [][]byte, off int64, s *scratch) error {
	n := int64(total(bufs))
	if err := im.transfer(unix.SYS_PWRITEV2, bufs, off, 0, s); err != nil {
		return err
	}
	im.over.written.set(off, n)
	return nil
}

// punchOver makes [off, off+n) read as zeros: they are in the file, which has a hole there.
func (im *image) punchOver(off, n int64) error {
	if err := im.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n); err != nil {
		return err
	}
	im.over.written.set(off, n)
	return nil
}

// slice appends to part what is in bufs from off on, n bytes.
func slice(part, bufs [][]byte, off, n int) [][]byte {
	for _, b := range bufs {
		if off >= len(b) {
			off -= len(b)
			continue
		}
		b = b[off:]
		b = b[:min(len(b), n)]
		if off, n = 0, n-len(b); len(b) > 0 {
			part = append(part, b)
		}
	}
	return part
}

const (
	pageSectors = 1 << 15 // of a page of sectors: 16 MiB of the disk, 4 KiB of memory
	pageWords   = pageSectors / 64
)

// sectors is a set of sectors of a disk, which only grows. It takes memory where there are some.
type sectors []atomic.Pointer[[pageWords]atomic.Uint64]

func newSectors(size int64) sectors {
	return make(sectors, (size/SectorSize+pageSectors-1)/pageSectors)
}

// run tells how many of the n bytes at off are alike, and whether they are in the set.
func (s sectors) run(off, n int64) (same int64, in bool) {
	first, end := off/SectorSize, (off+n)/SectorSize
	in = s.has(first)
	at := first + 1
	for at < end {
		if s[at/pageSectors].Load() == nil { // none of its page
			if in {
				break
			}
			at = min((at/pageSectors+1)*pageSectors, end)
			continue
		}
		if s.has(at) != in {
			break
		}
		at++
	}
	return (at - first) * SectorSize, in
}

func (s sectors) has(n int64) bool {
	page := s[n/pageSectors].Load()
	return page != nil && page[n%pageSectors/64].Load()>>(n%64)&1 != 0
}

// set adds the sectors of the n bytes at off.
func (s sectors) set(off, n int64) {
	for at, end := off/SectorSize, (off+n)/SectorSize; at < end; {
		slot := &s[at/pageSectors]
		page := slot.Load()
		if page == nil {
			slot.CompareAndSwap(nil, new([pageWords]atomic.Uint64))
			page = slot.Load()
		}
		upTo := min(end, (at/64+1)*64) // of one word
		mask := ^uint64(0) >> (64 - (upTo - at)) << (at % 64)
		page[at%pageSectors/64].Or(mask)
		at = upTo
	}
}
