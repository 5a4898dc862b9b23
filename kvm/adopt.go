package kvm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// File returns a descriptor of /dev/kvm, which the caller closes, for another process that
// calls [Adopt].
func (s *System) File() (*os.File, error) {
	fd, err := unix.FcntlInt(s.h.raw(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, opError(err, "duplicate", devicePath)
	}
	return os.NewFile(uintptr(fd), devicePath), nil
}

// Adopt makes a /dev/kvm that another process has opened the [Shared] System, for a process
// that may not open it itself. It takes the file over, also if it fails: it refuses another
// device.
func Adopt(file *os.File) error {
	fd, err := sameDevice(file)
	if err = errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("take over %s: %w", devicePath, err)
	}
	s, err := systemOf(fd)
	if err != nil {
		return err
	}
	shared.openMu.Lock()
	defer shared.openMu.Unlock()
	if shared.system != nil {
		return s.Close()
	}
	shared.system = s
	return nil
}

// sameDevice duplicates the descriptor if it is of /dev/kvm.
func sameDevice(file *os.File) (int, error) {
	var have, want unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &have); err != nil {
		return -1, err
	}
	if err := unix.Stat(devicePath, &want); err != nil {
		return -1, err
	}
	if have.Mode&unix.S_IFMT != unix.S_IFCHR || have.Rdev != want.Rdev {
		return -1, fmt.Errorf("expected device %#x, found mode %#o, device %#x", want.Rdev, have.Mode, have.Rdev)
	}
	return unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
}
