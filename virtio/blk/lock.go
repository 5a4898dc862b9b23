package blk

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// lock is the right to use the image.
//
// It is an open file description lock (fcntl(2), F_OFD_SETLK) on the whole
// file: it is this open file's and not the process's, so that two disks of one
// VM conflict, and the kernel drops it when the process ends, however it ends.
// Writers exclude all others, readers only writers. QEMU's locks, which lie on
// some bytes of the same file, conflict with it.
//
// Such locks are on the device node that was opened, of which there may be
// several for a block device. A writer therefore claims the device, too
// (open(2), O_EXCL), which also keeps it from being mounted meanwhile.
type lock struct {
	holderMu sync.Mutex // guards held and claim, and orders locking and unlocking
	held     bool
	claim    int // the open file that claims a block device, or -1
}

// acquire takes the lock, or says ErrInUse. Having it, it takes it again for
// nothing.
func (im *image) acquire() error {
	l := &im.lock
	l.holderMu.Lock()
	defer l.holderMu.Unlock()
	if l.held {
		return nil
	}
	kind := int16(unix.F_WRLCK)
	if im.readOnly {
		kind = unix.F_RDLCK
	}
	if err := im.setLock(kind); err != nil {
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return fmt.Errorf("disk %s: lock: %w", im.path, ErrInUse)
		}
		return fmt.Errorf("disk %s: lock: %w", im.path, err)
	}
	if im.device && !im.readOnly {
		self := fmt.Sprintf("/proc/self/fd/%d", im.fd)
		fd, err := retry(func() (int, error) { return unix.Open(self, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0) })
		if err != nil {
			unlockErr := im.setLock(unix.F_UNLCK)
			if errors.Is(err, unix.EBUSY) {
				err = fmt.Errorf("%w: it is mounted, or part of something that is in use", ErrInUse)
			}
			return errors.Join(fmt.Errorf("disk %s: claim the device: %w", im.path, err), unlockErr)
		}
		l.claim = fd
	}
	// What this host has cached may be older than what the last holder wrote
	// elsewhere. Local file systems know better, and lose nothing.
	_ = unix.Fadvise(im.fd, 0, 0, unix.FADV_DONTNEED)
	l.held = true
	return nil
}

// release gives the lock up.
func (im *image) release() error {
	l := &im.lock
	l.holderMu.Lock()
	defer l.holderMu.Unlock()
	if !l.held {
		return nil
	}
	if err := im.setLock(unix.F_UNLCK); err != nil {
		return fmt.Errorf("disk %s: unlock: %w", im.path, err)
	}
	l.held = false
	l.unclaim()
	return nil
}

// drop is for an image that is closed, which drops the lock itself.
func (l *lock) drop() {
	l.holderMu.Lock()
	defer l.holderMu.Unlock()
	l.held = false
	l.unclaim()
}

// unclaim closes the claim. Nothing was written through it that could fail now.
func (l *lock) unclaim() {
	if l.claim >= 0 {
		_ = unix.Close(l.claim)
		l.claim = -1
	}
}

func (im *image) setLock(kind int16) error {
	_, err := retry(func() (int, error) {
		return 0, unix.FcntlFlock(uintptr(im.fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Whence: unix.SEEK_SET})
	})
	return err
}
