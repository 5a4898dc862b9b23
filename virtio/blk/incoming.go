package blk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"github.com/govmm/govmm/internal/kind"
	"golang.org/x/sys/unix"
)

// A disk that comes with its guest is written to a file without a name (O_TMPFILE), which
// vanishes with the process, or with the attempt. It gets its name when the guest gets the
// right to run here. The image that the guest leaves behind is marked as moved, so that
// nobody starts an old copy by mistake; the next one that comes may take its place.

// movedMark is the extended attribute of an image whose guest has moved away with a copy.
const movedMark = "user.govmm.moved"

// ErrMoved is wrapped by the error for an image whose guest has moved away with a copy.
var ErrMoved = errors.New("its guest has moved away with a copy of it")

// incoming is the name that a disk's file gets.
type incoming struct {
	path   string
	hidden string        // the name that it has until then, where the file system has no O_TMPFILE; "": none
	synced chan struct{} // closed when the name is durable; nil: it has none yet
	err    error         // of making it durable; read when synced is closed
	// past is the file once more, which is written past the page cache: a disk may be larger
	// than that, and copying into it takes longer than the device. -1: that is not possible.
	past int
}

// openNew makes the file of a disk of size bytes that comes with its guest.
func openNew(c Config, size uint64) (*image, error) {
	if err := mayReplace(c.Path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(c.Path)
	flags := unix.O_CLOEXEC | unix.O_RDWR
	if c.Direct {
		flags |= unix.O_DIRECT
	}
	in := &incoming{path: c.Path, past: -1}
	fd, err := retry(func() (int, error) { return unix.Open(dir, flags|unix.O_TMPFILE, 0o600) })
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) && exists(dir) {
		in.hidden = filepath.Join(dir, fmt.Sprintf(".%s.%d.incoming", filepath.Base(c.Path), os.Getpid()))
		fd, err = retry(func() (int, error) { return unix.Open(in.hidden, flags|unix.O_CREAT|unix.O_EXCL, 0o600) })
	}
	if err != nil {
		return nil, fmt.Errorf("make a file in %s: %w", dir, err)
	}
	im := &image{path: c.Path, fd: fd, direct: c.Direct, offsetAlign: 1, memAlign: 1, fdatasync: unix.Fdatasync, incoming: in}
	im.lock.claim = -1
	if _, err := retry(func() (int, error) { return 0, unix.Ftruncate(fd, int64(size)) }); err != nil {
		return nil, errors.Join(fmt.Errorf("make it %d bytes long: %w", size, err), im.close())
	}
	in.past, err = retry(func() (int, error) {
		return unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		in.past = -1 // then it is written as others are
	}
	return im, nil
}

// write writes what is whole blocks past the page cache; done is how many bytes it was.
func (in *incoming) write(p []byte, off int64) (done int, err error) {
	if in.past < 0 || off%maxBlock != 0 || uintptr(unsafe.Pointer(unsafe.SliceData(p)))%maxBlock != 0 {
		return 0, nil
	}
	for whole := len(p) &^ (maxBlock - 1); done < whole; {
		n, err := retry(func() (int, error) { return unix.Pwrite(in.past, p[done:whole], off+int64(done)) })
		if errors.Is(err, unix.EINVAL) || err == nil && (n == 0 || n%maxBlock != 0) {
			return done, nil // the device has larger blocks
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// closePast ends the writing past the page cache.
func (in *incoming) closePast() {
	if in.past >= 0 {
		_ = unix.Close(in.past) // the file is open elsewhere
		in.past = -1
	}
}

func exists(path string) bool { return unix.Access(path, unix.F_OK) == nil }

// mayReplace fails if something is at path that is not an image whose guest has moved away.
func mayReplace(path string) error {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case err != nil:
		return fmt.Errorf("stat: %w", err)
	case st.Mode&unix.S_IFMT == unix.S_IFREG && isMoved(path):
		return nil
	}
	return errors.New("a disk is to be copied to it, and it exists, and is not one whose guest has moved away")
}

// isMoved reports whether the image has been marked.
func isMoved(path string) bool {
	_, err := unix.Lgetxattr(path, movedMark, nil)
	return err == nil
}

// publish gives the file its name.
func (im *image) publish() error {
	in := im.incoming
	if in == nil || in.synced != nil {
		return nil
	}
	if err := mayReplace(in.path); err != nil {
		return err
	}
	in.closePast()
	from := in.hidden
	if from == "" {
		from = filepath.Join(filepath.Dir(in.path), fmt.Sprintf(".%s.%d.incoming", filepath.Base(in.path), os.Getpid()))
		self := fmt.Sprintf("/proc/self/fd/%d", im.fd)
		if err := unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, from, unix.AT_SYMLINK_FOLLOW); err != nil {
			return fmt.Errorf("give the file a name: %w", err)
		}
	}
	if err := unix.Rename(from, in.path); err != nil {
		return errors.Join(fmt.Errorf("give the file its name: %w", err), unix.Unlink(from))
	}
	in.hidden, in.synced = "", make(chan struct{})
	go func() {
		defer close(in.synced)
		in.err = syncDirectory(filepath.Dir(in.path))
	}()
	return nil
}

func syncDirectory(path string) error {
	fd, err := retry(func() (int, error) { return unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = retry(func() (int, error) { return 0, unix.Fsync(fd) })
	return err
}

// named waits until the file's name is durable: a guest must not be told that a write is
// that would be gone with the file.
func (im *image) named() error {
	if im.incoming == nil || im.incoming.synced == nil {
		return nil
	}
	<-im.incoming.synced
	return im.incoming.err
}

// markMoved marks the image, or takes the mark away. It fails where the file system has no
// extended attributes.
func (im *image) markMoved(moved bool) error {
	if !moved {
		if _, err := unix.Fgetxattr(im.fd, movedMark, nil); err != nil {
			return nil // there is none, as with nearly every image
		}
		return unix.Fremovexattr(im.fd, movedMark)
	}
	return unix.Fsetxattr(im.fd, movedMark, []byte(time.Now().UTC().Format(time.RFC3339)), 0)
}

// checkMoved fails if the image has been marked.
func (im *image) checkMoved() error {
	b := make([]byte, 64)
	n, err := unix.Fgetxattr(im.fd, movedMark, b)
	if err != nil {
		return nil
	}
	at := strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return -1
		}
		return r
	}, string(b[:n]))
	return fmt.Errorf("%w, at %s: --force starts a guest from this old copy", ErrMoved, at)
}

// IsCopy reports whether the disk is copied here from another host.
func (d *Device) IsCopy() bool { return d.image.incoming != nil }

// The methods that follow are those of [migrate.DiskCopy].

// told is an error of this host's storage, of which the source reads what happened.
func (d *Device) told(err error) error {
	what := "its storage fails"
	if errno := unix.Errno(0); errors.As(err, &errno) {
		what = errno.Error()
	}
	return kind.Hidden(fmt.Errorf("disk %s: %w", d.config.Path, err), "a disk cannot be copied to this host: %s", what)
}

// Reserve reserves room for [off, off+n).
func (d *Device) Reserve(off, n uint64) error {
	err := d.image.fallocate(0, int64(off), int64(n))
	if err != nil && !unsupported(err) {
		return d.told(fmt.Errorf("reserve %d bytes at %d: %w", n, off, err))
	}
	return nil
}

// Write writes what the source has.
func (d *Device) Write(p []byte, off uint64) error {
	done, err := d.image.incoming.write(p, int64(off))
	if err == nil && done < len(p) {
		err = d.image.write([][]byte{p[done:]}, int64(off)+int64(done), false, new(scratch))
	}
	if err != nil {
		return d.told(fmt.Errorf("write %d bytes at %d: %w", len(p), off, err))
	}
	d.flushes.changed.Add(1)
	return nil
}

// Zero makes [off, off+n) read as zeros, as a hole where that is possible.
func (d *Device) Zero(off, n uint64) error {
	if err := d.image.zero(int64(off), int64(n), true, false, new(scratch)); err != nil {
		return d.told(fmt.Errorf("make %d bytes at %d read as zeros: %w", n, off, err))
	}
	d.flushes.changed.Add(1)
	return nil
}
