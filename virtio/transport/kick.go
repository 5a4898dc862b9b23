package transport

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// kick is the eventfd that counts a queue's notifications.
type kick struct {
	fd   int      // for the kernel
	file *os.File // the same, for the runtime's poller
}

func newKick() (*kick, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &kick{fd: fd, file: os.NewFile(uintptr(fd), "eventfd")}, nil
}

// wait waits for a notification. It returns false when the eventfd is closed.
func (k *kick) wait() bool {
	var count [8]byte
	_, err := k.file.Read(count[:])
	return err == nil
}

func (k *kick) close() error { return k.file.Close() }
