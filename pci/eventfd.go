package pci

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// eventFD is a vector's eventfd. It is a descriptor and not an os.File, because
// every message would wake the runtime's poller. MSIX.table prevents that signal
// and close run at the same time.
type eventFD int

func newEventFD() (eventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("eventfd: %w", err)
	}
	return eventFD(fd), nil
}

var one = binary.NativeEndian.AppendUint64(nil, 1)

// signal adds 1 to the count. It does not block; the largest count, 2^64-2, stays
// as it is.
func (e eventFD) signal() error {
	for {
		_, err := unix.Write(int(e), one)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			return fmt.Errorf("signal eventfd: %w", err)
		}
		return nil
	}
}

func (e eventFD) close() error {
	if err := unix.Close(int(e)); err != nil {
		return fmt.Errorf("close eventfd: %w", err)
	}
	return nil
}
