package blk

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/govmm/govmm/internal/bootid"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/strictcbor"
)

// At both ends of a migration the image must be the same storage. Its path and its
// size do not say so. So the source describes some blocks of it, read past this
// host's cache: the first and the last one, some that the migration's nonce chooses
// (half of them where the image is not sparse), and those that the guest wrote last,
// in which a copy of the image, or an old cache, differs first. Within one host it is
// known besides whether the file is the same; a copy with the same content is a
// warning, since somebody may have copied the disk of a paused guest.

const (
	sampleBlock = 4096
	// chosenBlocks is how many blocks the nonce chooses anywhere, dataBlocks how many
	// where there is data, writtenBlocks how many the guest wrote last. They are read at
	// the same time, while the guest stands still.
	chosenBlocks  = 6
	dataBlocks    = 6
	writtenBlocks = 12
	hashBytes     = 16
	// maxTold is how much of a text of the peer is repeated.
	maxTold = 200
)

// sample describes an image, for another host.
type sample struct {
	Path string `cbor:"path"`
	Size uint64 `cbor:"size"`
	// Kernel is the boot id of the running kernel, and File what it calls the file;
	// "": that would not tell it from another one.
	Kernel string `cbor:"kernel"`
	File   string `cbor:"file"`
	// Data and Written are numbers of blocks, beside those that the nonce chooses.
	Data    []uint64 `cbor:"data"`
	Written []uint64 `cbor:"written"`
	// Hashes are hashBytes for each block, in the order of sampled.
	Hashes []byte `cbor:"hashes"`
}

// written remembers the blocks that the guest wrote last.
type written struct {
	last   atomic.Uint64 // as blocks
	next   atomic.Uint32
	blocks [writtenBlocks]atomic.Uint64 // number of the block, plus 1; 0: none
}

func (w *written) add(block uint64) {
	if w.last.Load() != block+1 {
		w.last.Store(block + 1)
		w.blocks[w.next.Add(1)%writtenBlocks].Store(block + 1)
	}
}

func (w *written) list() []uint64 {
	list := []uint64{}
	for i := range w.blocks {
		if n := w.blocks[i].Load(); n > 0 {
			list = append(list, n-1)
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func (im *image) countBlocks() uint64 {
	return (im.sectors*SectorSize + sampleBlock - 1) / sampleBlock
}

// choose returns the number of a block that the nonce chooses.
func (im *image) choose(nonce [16]byte, i uint64) uint64 {
	h := sha256.Sum256(binary.LittleEndian.AppendUint64(nonce[:], i))
	return binary.LittleEndian.Uint64(h[:]) % im.countBlocks()
}

// withData returns blocks of the image that are not in a hole, if it has such, each the
// next one behind a place that the nonce chooses.
func (im *image) withData(nonce [16]byte) []uint64 {
	list := []uint64{}
	for i := range uint64(dataBlocks) {
		n := im.choose(nonce, chosenBlocks+i)
		off, err := unix.Seek(im.fd, int64(n*sampleBlock), unix.SEEK_DATA)
		if err != nil { // none behind it, or the file system does not know
			off, err = unix.Seek(im.fd, 0, unix.SEEK_DATA)
		}
		if err == nil {
			list = append(list, uint64(off)/sampleBlock)
		}
	}
	return list
}

// blocks returns the numbers of the blocks that are compared, in the order of hashes.
func (s *sample) blocks(im *image, nonce [16]byte) []uint64 {
	list := slices.Concat([]uint64{0, im.countBlocks() - 1}, s.Data, s.Written)
	for i := range uint64(chosenBlocks) {
		list = append(list, im.choose(nonce, i))
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// check reports what cannot be true of this image.
func (s *sample) check(im *image) error {
	if size := im.sectors * SectorSize; s.Size != size {
		return fmt.Errorf("expected %d bytes as at the source, found %d", s.Size, size)
	}
	if len(s.Data) > dataBlocks || len(s.Written) > writtenBlocks {
		return fmt.Errorf("%d and %d blocks to be compared: must be at most %d and %d", len(s.Data), len(s.Written), dataBlocks, writtenBlocks)
	}
	for _, n := range slices.Concat(s.Data, s.Written) {
		if n >= im.countBlocks() {
			return fmt.Errorf("block %d of %d bytes: must be within %d bytes", n, sampleBlock, s.Size)
		}
	}
	return nil
}

// Sample implements [virtio.Sampler].
func (d *Device) Sample(ctx context.Context, nonce [16]byte) ([]byte, error) {
	return within(ctx, d.config.Path, func() ([]byte, error) {
		if err := d.Sync(); err != nil {
			return nil, err
		}
		s := sample{Path: d.config.Path, Size: d.Size(), Data: d.image.withData(nonce), Written: d.written.list()}
		var err error
		if s.Kernel, s.File, err = d.image.identity(); err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.config.Path, err)
		}
		if s.Hashes, err = d.image.hashes(nonce, s.blocks(d.image, nonce)); err != nil {
			return nil, fmt.Errorf("disk %s: compare it with the destination's: %w", d.config.Path, err)
		}
		return strictcbor.Marshal(s)
	})
}

// Compare implements [virtio.Sampler].
func (d *Device) Compare(ctx context.Context, nonce [16]byte, b []byte) error {
	_, err := within(ctx, d.config.Path, func() ([]byte, error) {
		if err := d.compare(nonce, b); err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.config.Path, err)
		}
		return nil, nil
	})
	return err
}

// errOther is in the error of an image that is not the source's.
var errOther = errors.New("both sides must reach the same storage, and no old cache of it")

func (d *Device) compare(nonce [16]byte, b []byte) error {
	var s sample
	if err := strictcbor.Unmarshal(b, &s); err != nil {
		return kind.Told(fmt.Errorf("decode what the source says of it: %w", err))
	}
	err := d.compareWith(nonce, &s)
	says := "it cannot be compared here"
	if errors.Is(err, errOther) {
		says = "this host has other bytes: " + errOther.Error()
	}
	return kind.Hidden(err, "disk %.*s: %s", maxTold, s.Path, says)
}

func (d *Device) compareWith(nonce [16]byte, s *sample) error {
	if err := s.check(d.image); err != nil {
		return err
	}
	kernel, file, err := d.image.identity()
	if err != nil {
		return err
	}
	other := !d.config.Copied && kernel == s.Kernel && s.File != "" && file != "" && s.File != file
	list := s.blocks(d.image, nonce)
	if len(s.Hashes) != len(list)*hashBytes {
		return fmt.Errorf("%d bytes of hashes: must be %d for %d blocks", len(s.Hashes), len(list)*hashBytes, len(list))
	}
	hashes, err := d.image.hashes(nonce, list)
	if err != nil {
		return fmt.Errorf("compare it with the source's: %w", err)
	}
	for i, n := range list {
		at := i * hashBytes
		switch differs := string(hashes[at:at+hashBytes]) != string(s.Hashes[at:at+hashBytes]); {
		case differs && other:
			err := fmt.Errorf("expected the file of the source, %.*q, found another one with other bytes at offset %d; %w",
				maxTold, s.Path, n*sampleBlock, errOther)
			if d.image.inUse() {
				err = fmt.Errorf("lock: %w; %w", ErrInUse, err)
			}
			return err
		case differs:
			return fmt.Errorf("expected the content of the source's disk, %.*q, found other bytes at offset %d; %w",
				maxTold, s.Path, n*sampleBlock, errOther)
		}
	}
	if other && d.image.incoming == nil {
		d.log.Warn("the disk is another file than at the source, with the same content where it was compared",
			"device", "disk "+d.config.Path, "source", fmt.Sprintf("%.*s", maxTold, s.Path))
	}
	for _, n := range s.Written { // the guest may move on before it writes again
		d.written.add(n)
	}
	return nil
}

// within calls f, and leaves it alone when ctx ends: a system call on storage that
// does not answer cannot be called back.
func within(ctx context.Context, path string, f func() ([]byte, error)) ([]byte, error) {
	type result struct {
		b   []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		b, err := f()
		done <- result{b, err}
	}()
	select {
	case r := <-done:
		return r.b, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("disk %s: its storage does not answer: %w", path, context.Cause(ctx))
	}
}

// localFiles are the file systems on which two files are two if device or inode
// differ: statfs(2). On others, such as NFS, one file may have two of either, by
// two mounts.
var localFiles = []int64{unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC,
	unix.F2FS_SUPER_MAGIC, unix.OVERLAYFS_SUPER_MAGIC}

// identity returns the boot id of this kernel, and what is one file's on it.
func (im *image) identity() (kernel, file string, err error) {
	kernel = bootid.ID()
	if kernel == "" || im.readOnly { // a copy of what nobody writes is as good
		return "", "", nil
	}
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Fstat(im.fd, &st), unix.Fstatfs(im.fd, &fs)); err != nil {
		return "", "", fmt.Errorf("stat: %w", err)
	}
	switch {
	case im.device:
		file = fmt.Sprintf("device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	case slices.Contains(localFiles, fs.Type):
		file = fmt.Sprintf("device %d:%d inode %d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	}
	return kernel, file, nil
}

// parallelReads is how many blocks of a disk are read at once, each by a thread.
const parallelReads = 8

// hashes reads the blocks from the storage, and returns their hashes one after another.
func (im *image) hashes(nonce [16]byte, blocks []uint64) ([]byte, error) {
	own, err := unix.FcntlInt(uintptr(im.fd), unix.F_DUPFD_CLOEXEC, 0) // the image may be closed meanwhile
	if err != nil {
		return nil, fmt.Errorf("duplicate its file descriptor: %w", err)
	}
	defer unix.Close(own)
	// The file is opened once more, so that reads come from the storage and not from
	// this host's cache: with O_DIRECT where that is possible. A network file system
	// asks its server about a file that is opened.
	path := "/proc/self/fd/" + strconv.Itoa(own)
	if fd, err := openAgain(path, unix.O_DIRECT); err == nil {
		defer unix.Close(fd)
		hashes, err := im.hashesOf(fd, nonce, blocks)
		if !errors.Is(err, unix.EINVAL) { // the file system has no direct I/O, and says so only now
			return hashes, err
		}
	}
	fd, err := openAgain(path, 0)
	if err == nil {
		defer unix.Close(fd)
	} else { // its mode forbids that by now
		fd = own
	}
	_ = unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	return im.hashesOf(fd, nonce, blocks)
}

func openAgain(path string, flags int) (int, error) {
	return retry(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|flags, 0) })
}

func (im *image) hashesOf(fd int, nonce [16]byte, blocks []uint64) ([]byte, error) {
	size := im.sectors * SectorSize
	hashes := make([]byte, len(blocks)*hashBytes)
	errs := make([]error, len(blocks))
	var next atomic.Int64
	var all sync.WaitGroup
	for range min(parallelReads, len(blocks)) {
		all.Go(func() {
			block := alignedBlock()
			for i := int(next.Add(1)) - 1; i < len(blocks); i = int(next.Add(1)) - 1 {
				off := blocks[i] * sampleBlock
				want := int(min(sampleBlock, size-off))
				n, err := retry(func() (int, error) { return unix.Pread(fd, block, int64(off)) })
				switch {
				case err != nil:
					errs[i] = fmt.Errorf("read %d bytes at offset %d: %w", want, off, err)
				case n != want:
					errs[i] = fmt.Errorf("read at offset %d: expected %d bytes, found %d", off, want, n)
				default:
					h := sha256.New()
					h.Write(nonce[:])
					h.Write(block[:n])
					copy(hashes[i*hashBytes:], h.Sum(nil)[:hashBytes])
				}
			}
		})
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return hashes, nil
}

// alignedBlock returns a buffer for direct I/O of a block.
func alignedBlock() []byte {
	b := make([]byte, 2*sampleBlock)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (sampleBlock - 1)
	return b[skip : skip+sampleBlock : skip+sampleBlock]
}
