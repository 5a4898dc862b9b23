package snapshot

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// Snapshot is one that has been opened. It stays as it is: nothing in its directory is
// written.
type Snapshot struct {
	Manifest
	dir    string // absolute
	dirFD  int
	memory *os.File
	ends   []int64 // of frames, if memory is packed
	hot    []Range
	read   atomic.Uint64 // bytes of memory, see Read
}

// Open opens a snapshot and checks all that is small: everything but the content of
// memory, of disks and of the kernel, which [Snapshot.Verify] reads.
func Open(dir string) (_ *Snapshot, err error) {
	fail := func(err error) (*Snapshot, error) { return nil, fmt.Errorf("snapshot %s: %w", dir, err) }
	s := &Snapshot{dirFD: -1}
	if s.dir, err = filepath.Abs(dir); err != nil {
		return fail(err)
	}
	if s.dirFD, err = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fail(fmt.Errorf("open: %w", err))
	}
	if err := s.open(); err != nil {
		_ = s.Close()
		return fail(err)
	}
	return s, nil
}

func (s *Snapshot) open() error {
	b, err := s.readFile(manifestFile, maxManifest)
	if err != nil {
		return err
	}
	if s.Manifest, err = parseManifest(b); err != nil {
		return err
	}
	name, size := memoryFile, int64(s.Manifest.Memory.Bytes)
	if s.packed() {
		name, size = packedFile, -1
	}
	if s.memory, err = s.openFile(name); err != nil {
		return err
	}
	st, err := s.memory.Stat()
	if err != nil {
		return damaged("%s: %w", name, err)
	}
	if size >= 0 && st.Size() != size {
		return damaged("%s: expected %d bytes, found %d", name, size, st.Size())
	}
	// Whoever cuts the file off takes a mapping's pages away. A lock says that it is in use.
	_ = unix.FcntlFlock(s.memory.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart})
	hot, err := s.part(hotFile)
	if err != nil {
		return err
	}
	if s.hot, err = parseHot(hot, s.Manifest.Memory.Bytes>>mempage.Shift); err != nil {
		return damaged("%w", err)
	}
	if s.packed() {
		index, err := s.part(indexFile)
		if err != nil {
			return err
		}
		if s.ends, err = parseIndex(index, s.Manifest.Memory.Bytes, st.Size()); err != nil {
			return damaged("%w", err)
		}
	}
	return nil
}

// Close closes the files. What was mapped stays.
func (s *Snapshot) Close() error {
	var errs []error
	if s.memory != nil {
		errs = append(errs, s.memory.Close())
	}
	if s.dirFD >= 0 {
		errs = append(errs, unix.Close(s.dirFD))
	}
	s.memory, s.dirFD = nil, -1
	return errors.Join(errs...)
}

// openFile opens a file of the snapshot, which must be an ordinary one.
func (s *Snapshot) openFile(name string) (*os.File, error) {
	fd, err := unix.Openat(s.dirFD, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, damaged("%s is missing", name)
	case errors.Is(err, unix.ELOOP):
		return nil, damaged("%s: expected a file, found a link", name)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = unix.Close(fd)
		return nil, damaged("%s: expected a file, found something else", name)
	}
	return os.NewFile(uintptr(fd), filepath.Join(s.dir, name)), nil
}

// readFile reads a file of at most so many bytes.
func (s *Snapshot) readFile(name string, most int64) ([]byte, error) {
	f, err := s.openFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > most {
		return nil, damaged("%s of %d bytes: must be at most %d", name, st.Size(), most)
	}
	b := make([]byte, st.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, damaged("read %s: %w", name, err)
	}
	return b, nil
}

// has says whether a part is there.
func (s *Snapshot) has(name string) bool {
	_, ok := s.Parts[name]
	return ok
}

// part reads a part that the manifest lists, and checks its sum.
func (s *Snapshot) part(name string) ([]byte, error) {
	p := s.Parts[name]
	b, err := s.readFile(name, p.Bytes)
	if err != nil {
		return nil, err
	}
	if int64(len(b)) != p.Bytes {
		return nil, damaged("%s: expected %d bytes, found %d", name, p.Bytes, len(b))
	}
	if sumOf(b) != p.SHA256 {
		return nil, damaged("%s: its content is not what was written (SHA-256)", name)
	}
	return b, nil
}

// mapPart maps a part that may be large and is rarely read: the kernel. Its size is
// checked, its content by Verify.
func (s *Snapshot) mapPart(name string) ([]byte, error) {
	p, ok := s.Parts[name]
	if !ok || p.Bytes == 0 {
		return nil, nil
	}
	f, err := s.openFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Size() != p.Bytes {
		return nil, damaged("%s: expected %d bytes", name, p.Bytes)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(p.Bytes), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", name, err)
	}
	return b, nil
}

// session returns the nonce of the disks' samples.
func (s *Snapshot) session() (id [16]byte) {
	_, _ = hex.Decode(id[:], []byte(s.Session)) // the manifest was checked
	return id
}

// Read returns how many bytes of memory have been read so far, by an eager restore or by
// Verify. It may be called meanwhile.
func (s *Snapshot) Read() uint64 { return s.read.Load() }

// Verify reads everything but disks, and compares it with the sums of the manifest.
func (s *Snapshot) Verify(ctx context.Context) error {
	fail := func(err error) error { return fmt.Errorf("snapshot %s: %w", s.dir, err) }
	for name := range s.Parts {
		if _, err := s.part(name); err != nil {
			return fail(err)
		}
	}
	var sum string
	var err error
	if s.packed() {
		sum, _, err = s.readPacked(ctx, nil)
	} else {
		sum, _, err = sumMemory(ctx, s.memory, s.Manifest.Memory.Bytes, runtime.GOMAXPROCS(0), &s.read)
	}
	if err == nil {
		err = s.compareSum(sum)
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

func (s *Snapshot) compareSum(sum string) error {
	if sum != s.Manifest.Memory.SHA256 {
		return damaged("memory: its content is not what was written (SHA-256)")
	}
	return nil
}
