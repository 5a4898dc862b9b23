package blk

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	disks "github.com/govmm/govmm/image"
	"github.com/govmm/govmm/internal/testhook"
	"golang.org/x/sys/unix"
)

const (
	// SectorSize is the unit of capacities and requests (section 5.2.4), which
	// is not the block size.
	SectorSize = 512
	// maxBlock is the largest block size of storage, and the alignment of direct
	// I/O where the kernel does not report it.
	maxBlock = 4096
	// maxBytes keeps every offset an int64.
	maxBytes = 1 << 62
)

var (
	// ErrNotRaw is wrapped by the error for an image in a format such as qcow2.
	ErrNotRaw = errors.New("not a raw image")
	// ErrInUse is wrapped by the error for an image that is locked elsewhere.
	ErrInUse = errors.New("another process or disk uses it")
)

// image is the open file or block device.
type image struct {
	path     string
	fd       int
	readOnly bool
	direct   bool
	device   bool   // a block device
	sectors  uint64 // of SectorSize bytes

	topology Topology

	fdatasync func(fd int) error // unix.Fdatasync, except in tests

	// Alignments of direct I/O in bytes: of file offsets and lengths, and of
	// memory. 1 without it.
	offsetAlign, memAlign int

	// blocks is held while a block of offsetAlign bytes is read, changed in
	// part and written back, and for reading by every other write. It guards
	// the content of the disk, and so it is held across I/O.
	blocks sync.RWMutex

	lock lock

	incoming *incoming // nil: the image was there before

	// over is what an ephemeral disk reads where its guest has written nothing; nil: the
	// file is all.
	over *overlay
}

// openImage opens the image and checks it. It does not lock it.
func openImage(c Config) (*image, error) {
	if c.Ephemeral {
		return openEphemeral(c)
	}
	im, err := openFile(c)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", c.Path, err)
	}
	if err := im.inspect(c); err != nil {
		im.close()
		return nil, fmt.Errorf("disk %s: %w", c.Path, err)
	}
	return im, nil
}

func openFile(c Config) (*image, error) {
	// Before open, which blocks on a FIFO and makes a terminal the controlling one.
	var st unix.Stat_t
	if err := unix.Stat(c.Path, &st); err != nil {
		return nil, fmt.Errorf("stat: %w", err)
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFBLK {
		return nil, fmt.Errorf("neither a file nor a block device")
	}
	flags := unix.O_CLOEXEC | unix.O_RDWR
	if c.ReadOnly {
		flags = unix.O_CLOEXEC | unix.O_RDONLY
	}
	if c.Direct {
		flags |= unix.O_DIRECT
	}
	fd, err := retry(func() (int, error) { return unix.Open(c.Path, flags, 0) })
	switch {
	case errors.Is(err, unix.EINVAL) && c.Direct:
		return nil, fmt.Errorf("open: %w: the file system has no direct I/O; leave out direct", err)
	case (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EPERM)) && !c.ReadOnly:
		return nil, fmt.Errorf("open for writing: %w (readonly needs only read permission)", err)
	case err != nil:
		return nil, fmt.Errorf("open: %w", err)
	}
	im := &image{path: c.Path, fd: fd, readOnly: c.ReadOnly, direct: c.Direct, offsetAlign: 1, memAlign: 1, fdatasync: unix.Fdatasync}
	im.lock.claim = -1
	return im, nil
}

// inspect finds size and alignments, and refuses files that cannot be a disk.
func (im *image) inspect(c Config) error {
	var st unix.Stat_t
	if err := unix.Fstat(im.fd, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		im.device = true
	case unix.S_IFREG:
	default:
		return fmt.Errorf("neither a file nor a block device")
	}
	size, err := unix.Seek(im.fd, 0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("find its size: %w", err)
	}
	if !c.Raw {
		if err := probe(c.Path, size); err != nil {
			return err
		}
	}
	im.findAlignment()
	align := max(SectorSize, im.offsetAlign)
	switch {
	case size == 0:
		return fmt.Errorf("it is empty; truncate -s 10G %s makes it 10 GiB of zeros", quote(c.Path))
	case size%int64(align) != 0:
		return fmt.Errorf("its size of %d bytes is not a multiple of %d; truncate -s %%%d %s pads it", size, align, align, quote(c.Path))
	case size > maxBytes:
		return fmt.Errorf("its size of %d bytes is larger than the limit of %d", size, int64(maxBytes))
	}
	im.sectors = uint64(size) / SectorSize
	im.topology = im.findTopology(uint64(st.Blksize))
	return nil
}

// findAlignment finds the alignments of direct I/O (statx(2), STATX_DIOALIGN).
func (im *image) findAlignment() {
	if !im.direct {
		return
	}
	im.offsetAlign, im.memAlign = maxBlock, maxBlock
	if n, err := unix.IoctlGetInt(im.fd, unix.BLKSSZGET); im.device && err == nil && powerOf2(n, maxBlock) {
		im.offsetAlign = n
	}
	var stx unix.Statx_t
	if err := unix.Statx(im.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx); err != nil || stx.Mask&unix.STATX_DIOALIGN == 0 {
		return
	}
	if n := int(stx.Dio_offset_align); powerOf2(n, maxBlock) {
		im.offsetAlign = max(n, SectorSize)
	}
	if n := int(stx.Dio_mem_align); powerOf2(n, maxBlock) {
		im.memAlign = n
	}
}

func powerOf2(n, most int) bool { return n > 0 && n <= most && n&(n-1) == 0 }

// findTopology finds the topology of the storage. The blocks of a file are
// sectors on any storage: a partition table counts in blocks, and must not change
// its meaning with the host.
func (im *image) findTopology(fileBlock uint64) Topology {
	t := Topology{BlockSize: SectorSize, DiscardAlign: 1}
	physical, minIO, optIO := int(min(fileBlock, maxBlock)), 0, 0
	if im.device {
		ioctl := func(request uint) int {
			n, err := unix.IoctlGetInt(im.fd, request)
			if err != nil || n < 0 {
				return 0
			}
			return n
		}
		if n := ioctl(unix.BLKSSZGET); powerOf2(n, maxBlock) && n >= SectorSize {
			t.BlockSize = uint32(n)
		}
		physical, minIO, optIO = ioctl(unix.BLKPBSZGET), ioctl(unix.BLKIOMIN), ioctl(unix.BLKIOOPT)
	}
	block := int(t.BlockSize)
	if powerOf2(physical, 1<<20) {
		for block<<t.PhysicalExp < physical {
			t.PhysicalExp++
		}
	}
	t.DiscardAlign = t.BlockSize << t.PhysicalExp / SectorSize
	t.MinIO = uint16(min(max(minIO, block<<t.PhysicalExp)/block, 1<<16-1))
	t.OptIO = uint32(min(optIO/block, 1<<31))
	return t
}

// probe refuses an image of size bytes that looks like another format's. It opens
// the file again, without the alignments of direct I/O: files of other formats
// have any length.
func probe(path string, size int64) error {
	fd, err := retry(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return fmt.Errorf("open it to find its format: %w", err)
	}
	defer unix.Close(fd)
	var ends [2][]byte
	for i, off := range []int64{0, max(0, size-disks.ProbeBytes)} {
		p := make([]byte, disks.ProbeBytes)
		n, err := retry(func() (int, error) { return unix.Pread(fd, p, off) })
		if err != nil {
			return fmt.Errorf("read its format: %w", err)
		}
		ends[i] = p[:n]
	}
	return refuseFormat(path, ends[0], ends[1])
}

// flush makes writes durable.
func (im *image) flush() error {
	if im.readOnly || im.over != nil {
		return nil
	}
	time.Sleep(time.Duration(testhook.SlowFlush.Load()))
	if _, err := retry(func() (int, error) { return 0, im.fdatasync(im.fd) }); err != nil {
		return err
	}
	return im.named()
}

// close closes the file, which also unlocks it.
func (im *image) close() error {
	im.lock.drop()
	if in := im.incoming; in != nil {
		in.closePast()
		if in.hidden != "" {
			_ = unix.Unlink(in.hidden) // nobody else knows it
		}
	}
	if err := unix.Close(im.fd); err != nil {
		return fmt.Errorf("disk %s: close: %w", im.path, err)
	}
	return nil
}

// retry calls f again after EINTR.
func retry(f func() (int, error)) (int, error) {
	for {
		if n, err := f(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
