package blk

import (
	"errors"
	"fmt"
	"sync"

	disks "github.com/govmm/govmm/image"
	"golang.org/x/sys/unix"
)

// lock is the right to use the image.
//
// It is an open file description lock (fcntl(2), F_OFD_SETLK) on the whole
// file. It belongs to the open file, not to the process, so two disks of one VM
// conflict; the kernel drops it when the process ends. Writers exclude all
// others, readers exclude only writers. QEMU's locks, which lie on some bytes of
// the same file, conflict with it.
//
// A lock is on the device node that was opened, and a block device may have
// several nodes. A writer therefore also claims the device (open(2), O_EXCL),
// which keeps it from being mounted, too.
type lock struct {
	holderMu sync.Mutex // guards held and claim, and orders locking and unlocking
	held     bool
	claim    int // the open file that claims a block device, or -1

	inherited bool // from another process of this host, whose lock this is, too
}

// acquire takes the lock, or fails with ErrInUse. It succeeds if the lock is held
// already.
func (im *image) acquire() error {
	l := &im.lock
	l.holderMu.Lock()
	defer l.holderMu.Unlock()
	if im.over != nil { // it is given up when the disk is closed
		if l.held {
			return nil
		}
		err := disks.Lock(im.over.base)
		if errors.Is(err, disks.ErrInUse) {
			err = fmt.Errorf("disk %s: lock: %w", im.path, ErrInUse)
		}
		l.held = err == nil
		return err
	}
	kind := int16(unix.F_WRLCK)
	if im.readOnly {
		kind = unix.F_RDLCK
	}
	// Also if it is held: another process that had the same open file, and was to take the
	// guest over, may have unlocked it.
	if err := im.setLock(kind); err != nil {
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return fmt.Errorf("disk %s: lock: %w", im.path, ErrInUse)
		}
		return fmt.Errorf("disk %s: lock: %w", im.path, err)
	}
	if l.held {
		return nil
	}
	if im.device && !im.readOnly && l.claim < 0 {
		self := fmt.Sprintf("/proc/self/fd/%d", im.fd)
		fd, err := retry(func() (int, error) { return unix.Open(self, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0) })
		if err != nil {
			unlockErr := im.setLock(unix.F_UNLCK)
			if errors.Is(err, unix.EBUSY) {
				err = fmt.Errorf("%w: it is mounted, or a part of another device", ErrInUse)
			}
			return errors.Join(fmt.Errorf("disk %s: claim the device: %w", im.path, err), unlockErr)
		}
		l.claim = fd
	}
	// This host's cache may be older than what the last holder wrote on another
	// host. On a local file system this changes nothing. Nobody else has written a disk
	// that was copied here, and to drop its pages takes longer than a stop.
	if !l.inherited && im.incoming == nil {
		_ = unix.Fadvise(im.fd, 0, 0, unix.FADV_DONTNEED)
	}
	l.held = true
	return nil
}

// release unlocks the image.
func (im *image) release() error {
	l := &im.lock
	l.holderMu.Lock()
	defer l.holderMu.Unlock()
	if !l.held || im.over != nil {
		return nil
	}
	if err := im.setLock(unix.F_UNLCK); err != nil {
		return fmt.Errorf("disk %s: unlock: %w", im.path, err)
	}
	l.held = false
	l.unclaim()
	return nil
}

// drop notes that the lock is gone: the image is about to be closed.
func (l *lock) drop() {
	l.holderMu.Lock()
	defer l.holderMu.Unlock()
	l.held = false
	l.unclaim()
}

// unclaim closes the claim. Nothing was written through it, so that an error has
// no meaning.
func (l *lock) unclaim() {
	if l.claim >= 0 {
		_ = unix.Close(l.claim)
		l.claim = -1
	}
}

// inUse reports whether somebody else has the image, as far as locks tell.
func (im *image) inUse() bool {
	other := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
	err := unix.FcntlFlock(uintptr(im.fd), unix.F_OFD_GETLK, &other)
	return err == nil && other.Type != unix.F_UNLCK
}

func (im *image) setLock(kind int16) error {
	_, err := retry(func() (int, error) {
		return 0, unix.FcntlFlock(uintptr(im.fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Whence: unix.SEEK_SET})
	})
	return err
}
