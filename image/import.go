package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/govmm/govmm/internal/units"
	"golang.org/x/sys/unix"
)

// SectorSize is what the size of a disk is a multiple of.
const SectorSize = 512

const (
	// chunkBytes is what a worker copies at a time: a multiple of each size of clusters.
	chunkBytes = 2 << 20
	// holeBytes is the smallest run of zeros that becomes a hole.
	holeBytes = 4096
	// progressEvery is how often progress is told.
	progressEvery = 100 * time.Millisecond
	// maxDisk keeps each offset an int64.
	maxDisk = 1 << 62
)

// ImportOptions say how [Import] works.
type ImportOptions struct {
	// Format is what the image is; "": see [Detect].
	Format Format
	// Size is the size of the new disk in bytes, rounded up to sectors; 0: the image's.
	// It is not smaller than the image's.
	Size uint64
	// Force replaces a file that is there.
	Force bool
	// Progress is called now and then, by one goroutine; nil: nobody is told.
	Progress func(Progress)
}

// Progress tells how far an import is.
type Progress struct {
	// Done and Total are bytes of the disk, or of a file that is decompressed, whose disk
	// is as large as it turns out to be.
	Done, Total int64
	// Written is bytes that were written to the new disk.
	Written int64
}

// Imported tells what an import did.
type Imported struct {
	Kind    Kind
	Size    int64 // of the disk
	Written int64 // bytes; the rest are holes
}

// Import makes a raw disk, the file at to, of the image at from. It has holes where the image
// has zeros. The file has its name only when it is complete and durable; if Import fails or
// ctx ends, nothing is left. Errors are lines for people and name the files.
func Import(ctx context.Context, from, to string, o ImportOptions) (Imported, error) {
	done, err := importFile(ctx, from, to, o)
	if err != nil {
		return Imported{}, fmt.Errorf("import %s to %s: %w", from, to, err)
	}
	return done, nil
}

func importFile(ctx context.Context, from, to string, o ImportOptions) (done Imported, err error) {
	f, err := openFor(from)
	if err != nil {
		return done, err
	}
	opened := []io.Closer{f}
	defer func() {
		for _, c := range opened {
			_ = c.Close() // read only
		}
	}()
	if done.Kind, err = Detect(f, from, o.Format); err != nil {
		return done, err
	}
	if err := apart(f, to); err != nil {
		return done, err
	}
	out, err := create(to, o.Force)
	if err != nil {
		return done, err
	}
	defer out.abandon()
	c := &copier{out: out, progress: o.Progress}
	defer c.watch()()
	switch {
	case done.Kind.Compression == "":
		var r Reader
		opened = nil // r has it
		if r, err = openKnown(f, from, done.Kind); err != nil {
			return done, err
		}
		opened = []io.Closer{r}
		err = c.image(ctx, r)
	case done.Kind.Format == Raw:
		err = c.stream(ctx, f, done.Kind.Compression)
	default:
		err = c.packed(ctx, f, from, done.Kind)
	}
	if err == nil {
		done.Size, err = c.finish(o.Size)
	}
	if err != nil {
		return done, err
	}
	done.Written = c.written.Load()
	return done, out.commit()
}

// apart fails if a new disk would take the place of its image.
func apart(f *os.File, to string) error {
	from, err := f.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Stat(to); err == nil && os.SameFile(from, there) {
		return errors.New("the new disk and the image are the same file")
	}
	return nil
}

// openKnown opens an image whose kind is known, and locks it.
func openKnown(f *os.File, path string, k Kind) (Reader, error) {
	r, err := OpenFile(f, path, k.Format)
	if err != nil {
		return nil, err
	}
	if l, ok := r.(*layered); ok && l.Backing != "" && k.Guessed {
		return nil, errors.Join(fmt.Errorf("image %s: it has a backing file, and that it is qcow2 is a guess from its content; say --format qcow2 if you know where it comes from", path), r.Close())
	}
	if err := Lock(r); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// copier copies a disk to a file.
type copier struct {
	out      *target
	size     int64 // of the disk; known at the end
	progress func(Progress)

	// writeMu is held across writes: the kernel carries out one at a time, and who waits
	// for it there keeps a processor from a goroutine that decompresses.
	writeMu sync.Mutex

	done, total, written atomic.Int64
}

// watch tells progress until the function that it returns is called.
func (c *copier) watch() func() {
	if c.progress == nil {
		return func() {}
	}
	stop := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if total := c.total.Load(); total > 0 {
					c.progress(Progress{min(c.done.Load(), total), total, c.written.Load()})
				}
			case <-stop:
				return
			}
		}
	})
	return func() { close(stop); watching.Wait() }
}

// workers is how many goroutines read, decompress and write: one more than can run, since
// one of them waits for the storage.
func workers() int { return min(8, runtime.GOMAXPROCS(0)) + 1 }

// image copies an image whose bytes can be read anywhere.
func (c *copier) image(ctx context.Context, r Reader) error {
	if l, ok := r.(*layered); ok {
		if _, err := l.Check(ctx); err != nil {
			return fmt.Errorf("image %s: %w", l.files.path, err)
		}
	}
	c.size = r.Size()
	c.total.Store(c.size)
	if c.size > maxDisk {
		return fmt.Errorf("a disk of %d bytes: expected at most %d", c.size, int64(maxDisk))
	}
	if raw, ok := r.(*raw); ok && unix.IoctlFileClone(int(c.out.Fd()), int(raw.Fd())) == nil {
		c.written.Store(c.size) // shared by both, on a file system that can
		return nil
	}
	if err := c.out.Truncate(c.size); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	walk := walker{r: r, size: c.size}
	var all sync.WaitGroup
	for range workers() {
		all.Go(func() {
			buf := alignedBuffer()
			for ctx.Err() == nil {
				off, n, err := walk.next()
				if err == nil && n > 0 {
					err = c.chunk(r, buf[:n], off)
				}
				if err != nil {
					cancel(err)
				}
				if n == 0 {
					return
				}
				c.done.Store(off + int64(n))
			}
		})
	}
	all.Wait()
	return context.Cause(ctx)
}

// walker divides the parts of a disk that may have data into chunks.
type walker struct {
	r    Reader
	size int64

	atMu sync.Mutex // guards at
	at   int64
}

// next returns the next chunk; n is 0 when there are no more.
func (w *walker) next() (off int64, n int, err error) {
	w.atMu.Lock()
	defer w.atMu.Unlock()
	for w.at < w.size {
		n, zeros, err := w.r.Extent(w.at)
		if err != nil {
			w.at = w.size
			return 0, 0, err
		}
		if zeros {
			w.at += n
			continue
		}
		off = w.at &^ (directBlock - 1) // what is between is zeros, or the chunk before would have it
		w.at = min(off&^(chunkBytes-1)+chunkBytes, w.size)
		return off, int(w.at - off), nil
	}
	return 0, 0, nil
}

// chunk copies what is at off of the disk.
func (c *copier) chunk(r io.ReaderAt, buf []byte, off int64) error {
	if n, err := r.ReadAt(buf, off); n < len(buf) {
		if err == nil || errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: it has become shorter", io.ErrUnexpectedEOF)
		}
		return fmt.Errorf("read %d bytes at %d: %w", len(buf), off, err)
	}
	return c.write(buf, off)
}

// write writes what is not zero of p, which is aligned memory, to off, which is a multiple of holeBytes.
func (c *copier) write(p []byte, off int64) error {
	for len(p) > 0 {
		n := zeroRun(p)
		p, off = p[n:], off+int64(n)
		if n = dataRun(p); n == 0 {
			continue
		}
		if err := c.writeRun(p[:n], off); err != nil {
			return err
		}
		c.written.Add(int64(n))
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// directBytes is the smallest run that is written past the page cache, which takes a fifth
// of the time, but for each write a turn of the device.
const directBytes = 128 << 10

// writeRun writes p to off.
func (c *copier) writeRun(p []byte, off int64) error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if len(p) >= directBytes && c.out.direct != nil {
		n := len(p) &^ (directBlock - 1)
		_, err := c.out.direct.WriteAt(p[:n], off)
		if err == nil {
			p, off = p[n:], off+int64(n)
		} else if !errors.Is(err, unix.EINVAL) {
			return err // with EINVAL it is not for such blocks
		}
	}
	if len(p) == 0 {
		return nil
	}
	_, err := c.out.WriteAt(p, off)
	// The storage begins with it at once, so that little is left to wait for at the end.
	_ = unix.SyncFileRange(int(c.out.Fd()), off, int64(len(p)), unix.SYNC_FILE_RANGE_WRITE)
	return err
}

// alignedBuffer is memory for a chunk.
func alignedBuffer() []byte {
	b := make([]byte, chunkBytes+directBlock)
	past := int(uintptr(unsafe.Pointer(&b[0])) & (directBlock - 1))
	return b[directBlock-past:][:chunkBytes]
}

var zeros [holeBytes]byte

// zeroRun is how many bytes at the front of p are zeros, in whole blocks.
func zeroRun(p []byte) (n int) {
	for n < len(p) && isZero(p[n:min(n+holeBytes, len(p))]) {
		n = min(n+holeBytes, len(p))
	}
	return n
}

// dataRun is how many bytes there are before the next block of zeros.
func dataRun(p []byte) (n int) {
	for n < len(p) && !isZero(p[n:min(n+holeBytes, len(p))]) {
		n = min(n+holeBytes, len(p))
	}
	return n
}

func isZero(p []byte) bool { return string(p) == string(zeros[:len(p)]) }

// stream copies a raw disk that is compressed: one goroutine decompresses, others write.
func (c *copier) stream(ctx context.Context, f *os.File, compression string) error {
	in, err := c.decompress(ctx, f, compression)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type piece struct {
		buf []byte
		off int64
	}
	full, empty := make(chan piece), make(chan []byte, workers()+1)
	for range cap(empty) {
		empty <- alignedBuffer()
	}
	var all sync.WaitGroup
	for range workers() {
		all.Go(func() {
			for p := range full {
				if err := c.write(p.buf, p.off); err != nil {
					cancel(err)
				}
				empty <- p.buf[:chunkBytes]
			}
		})
	}
	for err == nil && ctx.Err() == nil {
		buf := <-empty
		var n int
		n, err = io.ReadFull(in, buf)
		if c.size += int64(n); c.size > maxDisk {
			err = fmt.Errorf("a disk of more than %d bytes", int64(maxDisk))
		}
		full <- piece{buf[:n], c.size - int64(n)}
	}
	close(full)
	all.Wait()
	if err == io.EOF || err == io.ErrUnexpectedEOF { // of ReadFull: those of the file are wrapped
		err = nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	_ = in.Close() // it was read to its end, or failed
	return err
}

// decompress reads what is in a compressed file, until ctx ends, and tells how far it is.
func (c *copier) decompress(ctx context.Context, f *os.File, compression string) (io.ReadCloser, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	c.total.Store(st.Size())
	return decompressFrom(&counted{ctx, io.NewSectionReader(f, 0, 1<<63-1), &c.done}, compression)
}

// counted counts what is read.
type counted struct {
	ctx  context.Context
	r    io.Reader
	done *atomic.Int64
}

func (c *counted) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.r.Read(p)
	c.done.Add(int64(n))
	return n, err
}

// packed copies an image that is compressed as a whole. It must be read anywhere: so it is
// decompressed to a file without a name beside the new disk first.
func (c *copier) packed(ctx context.Context, f *os.File, path string, k Kind) error {
	in, err := c.decompress(ctx, f, k.Compression)
	if err != nil {
		return err
	}
	defer in.Close()
	whole, err := TempFile(filepath.Dir(c.out.path))
	if err != nil {
		return err
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{whole}, in, make([]byte, 1<<20)); err != nil {
		return errors.Join(err, whole.Close())
	}
	h, err := headerOf(whole)
	if err == nil && h.Backing != "" {
		err = fmt.Errorf("image %s: it has a backing file, which nothing lies beside in %s; decompress it first", path, k.Compression)
	}
	if err != nil {
		return errors.Join(err, whole.Close())
	}
	r, err := OpenFile(whole, path, k.Format)
	if err != nil {
		return err
	}
	c.done.Store(0)
	return errors.Join(c.image(ctx, r), r.Close())
}

// TempFile makes a file without a name in a directory. It is gone when it is closed.
func TempFile(dir string) (*os.File, error) {
	if fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC|unix.O_EXCL, 0o600); err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "(a file without a name)")), nil
	}
	f, err := os.CreateTemp(dir, ".govmm-*") // the file system has none, or there is an error that this finds too
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// finish gives the new disk its size.
func (c *copier) finish(size uint64) (int64, error) {
	if c.size == 0 {
		return 0, errors.New("the disk is empty")
	}
	whole := (c.size + SectorSize - 1) &^ (SectorSize - 1)
	if size > 0 {
		if size > maxDisk {
			return 0, fmt.Errorf("a size of %d bytes: expected at most %d", size, int64(maxDisk))
		}
		if whole = (int64(size) + SectorSize - 1) &^ (SectorSize - 1); whole < c.size {
			return 0, fmt.Errorf("a size of %d bytes (%s): the image's disk has %d (%s), and is not made smaller", size, units.Bytes(size), c.size, units.Bytes(uint64(c.size)))
		}
	}
	return whole, c.out.Truncate(whole)
}
