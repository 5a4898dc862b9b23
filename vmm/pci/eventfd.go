package pci

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// EventFD is a counter of the kernel that wakes who waits for it.
type EventFD struct {
	fd   int
	file *os.File
}

// NewEventFD makes one with a count of 0.
func NewEventFD() (*EventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &EventFD{fd: fd, file: os.NewFile(uintptr(fd), "eventfd")}, nil
}

// FD is the descriptor, for the kernel's other interfaces. It is valid until
// Close.
func (e *EventFD) FD() int { return e.fd }

var one = binary.NativeEndian.AppendUint64(nil, 1)

// Signal adds 1 to the count. It would block at a count of 2^64-2 only.
func (e *EventFD) Signal() error {
	if _, err := e.file.Write(one); err != nil {
		return fmt.Errorf("signal eventfd: %w", err)
	}
	return nil
}

// Wait returns when the count is not 0, and makes it 0. After Close it fails
// with [os.ErrClosed].
func (e *EventFD) Wait() error {
	var count [8]byte
	_, err := e.file.Read(count[:])
	return err
}

// Close closes it and ends Wait.
func (e *EventFD) Close() error { return e.file.Close() }
