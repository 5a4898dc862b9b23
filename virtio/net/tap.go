package net

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Offloads of if_tun.h that x/sys does not define (Linux 6.2).
const (
	tunFUSO4 = 0x20
	tunFUSO6 = 0x40
)

// Tap is a tap device of the host, with struct virtio_net_hdr in front of each
// frame (IFF_VNET_HDR). It implements [Backend].
type Tap struct {
	name     string
	mtu      uint16
	offloads uint64
	ports    []*tapPort

	queues   sync.Mutex // guards attached, and orders attaching and detaching
	attached int        // ports
}

// tapPort is one queue of a tap (IFF_MULTI_QUEUE).
type tapPort struct {
	file *os.File
	raw  syscall.RawConn
	fd   int

	// The Read under way.
	read func(fd uintptr) bool
	p    []byte
	idle func()
	n    int
	err  error
}

// openQueues opens n queues of the tap called name, and makes the tap if it does
// not exist. name may be a pattern such as tap%d.
func openQueues(name string, n int) (*Tap, error) {
	t := &Tap{name: name}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if n > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	for range n {
		p, got, err := openQueue(t.name, flags)
		if errors.Is(err, unix.EINVAL) && n == 1 {
			// The tap exists and was made for several queues.
			p, got, err = openQueue(t.name, flags|unix.IFF_MULTI_QUEUE)
		}
		if err != nil {
			return nil, errors.Join(err, t.Close())
		}
		t.name = got
		t.ports = append(t.ports, p)
	}
	t.attached = n
	if err := t.setUp(); err != nil {
		return nil, errors.Join(fmt.Errorf("tap %s: %w", t.name, err), t.Close())
	}
	return t, nil
}

// openQueue opens one queue and returns the tap's name. Go's poller gets the file
// after TUNSETIFF, because it cannot be polled before.
func openQueue(name string, flags uint16) (*tapPort, string, error) {
	const device = "/dev/net/tun"
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, "", tapError(name, &os.PathError{Op: "open", Path: device, Err: err})
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, HeaderBytes)
	}
	if err != nil {
		return nil, "", errors.Join(tapError(name, err), unix.Close(fd))
	}
	p, err := newPort(fd, device)
	if err != nil {
		return nil, "", tapError(name, err)
	}
	return p, req.Name(), nil
}

// newPort takes over fd, which does not block and reads and writes one frame per
// call.
func newPort(fd int, device string) (*tapPort, error) {
	p := &tapPort{file: os.NewFile(uintptr(fd), device), fd: fd}
	p.read = p.readOnce
	var err error
	if p.raw, err = p.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, p.file.Close())
	}
	return p, nil
}

// setUp finds the offloads of the host and leaves one queue attached.
func (t *Tap) setUp() error {
	all := []uint64{guestOffloads, guestOffloads &^ (FeatureGuestUSO4 | FeatureGuestUSO6), FeatureGuestCsum}
	for _, guest := range all {
		if t.SetOffloads(guest) == nil {
			t.offloads = guest
			break
		}
	}
	for _, pair := range []struct{ guest, host uint64 }{
		{FeatureGuestCsum, FeatureCsum},
		{FeatureGuestTSO4, FeatureHostTSO4},
		{FeatureGuestTSO6, FeatureHostTSO6},
		{FeatureGuestECN, FeatureHostECN},
		{FeatureGuestUSO4, FeatureHostUSO},
	} {
		if t.offloads&pair.guest != 0 {
			t.offloads |= pair.host
		}
	}
	if err := t.SetOffloads(0); err != nil {
		return err
	}
	return t.SetPairs(1)
}

// Name is the name for users.
func (t *Tap) Name() string { return "tap " + t.name }

// Interface is the host's name for the tap.
func (t *Tap) Interface() string { return t.name }

// MTU is that of the tap.
func (t *Tap) MTU() uint16 { return t.mtu }

// Ports are the queues.
func (t *Tap) Ports() []Port {
	var ports []Port
	for _, p := range t.ports {
		ports = append(ports, p)
	}
	return ports
}

// Offloads are the offloads that this host's kernel supports.
func (t *Tap) Offloads() uint64 { return t.offloads }

// SetOffloads tells the kernel what the guest accepts (TUNSETOFFLOAD). The kernel
// does the rest itself.
func (t *Tap) SetOffloads(guest uint64) error {
	var v int
	if guest&FeatureGuestCsum != 0 {
		v |= unix.TUN_F_CSUM
		for _, f := range []struct {
			feature uint64
			flag    int
		}{
			{FeatureGuestTSO4, unix.TUN_F_TSO4},
			{FeatureGuestTSO6, unix.TUN_F_TSO6},
			{FeatureGuestECN, unix.TUN_F_TSO_ECN},
		} {
			if guest&f.feature != 0 {
				v |= f.flag
			}
		}
		// ECN needs one of the other two. The kernel has both of UDP's or none.
		if v&(unix.TUN_F_TSO4|unix.TUN_F_TSO6) == 0 {
			v &^= unix.TUN_F_TSO_ECN
		}
		if guest&FeatureGuestUSO4 != 0 && guest&FeatureGuestUSO6 != 0 {
			v |= tunFUSO4 | tunFUSO6
		}
	}
	if err := unix.IoctlSetInt(t.ports[0].fd, unix.TUNSETOFFLOAD, v); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD %#x: %w", v, err)
	}
	return nil
}

// SetPairs attaches the first n queues and detaches the others (TUNSETQUEUE).
func (t *Tap) SetPairs(n int) error {
	t.queues.Lock()
	defer t.queues.Unlock()
	if n < 1 || n > len(t.ports) {
		return fmt.Errorf("%d queues of %d", n, len(t.ports))
	}
	for t.attached < n {
		if err := t.setQueue(t.attached, unix.IFF_ATTACH_QUEUE); err != nil {
			return err
		}
		t.attached++
	}
	for t.attached > n {
		if err := t.setQueue(t.attached-1, unix.IFF_DETACH_QUEUE); err != nil {
			return err
		}
		t.attached--
	}
	return nil
}

func (t *Tap) setQueue(i int, flag uint16) error {
	req, err := unix.NewIfreq(t.name)
	if err != nil {
		return err
	}
	req.SetUint16(flag)
	if err := unix.IoctlIfreq(t.ports[i].fd, unix.TUNSETQUEUE, req); err != nil {
		return fmt.Errorf("TUNSETQUEUE of queue %d: %w", i, err)
	}
	return nil
}

// Close closes the tap. A tap without an owner that was made here disappears.
func (t *Tap) Close() error {
	var errs []error
	for _, p := range t.ports {
		errs = append(errs, p.file.Close())
	}
	return errors.Join(errs...)
}

// Read waits for a frame.
func (t *tapPort) Read(p []byte, idle func()) (int, error) {
	t.p, t.idle, t.n, t.err = p, idle, 0, nil
	if err := t.raw.Read(t.read); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return 0, ErrInterrupted
		}
		return 0, err
	}
	if t.err == nil && t.n == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	return t.n, t.err
}

// readOnce returns false if it has to wait.
func (t *tapPort) readOnce(fd uintptr) bool {
	for {
		n, err := unix.Read(int(fd), t.p)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			t.idle()
			return false
		case err != nil:
			t.err = fmt.Errorf("read: %w", err)
			return true
		}
		t.n = n
		return true
	}
}

// Write sends a frame.
func (t *tapPort) Write(p []byte) error {
	for {
		_, err := unix.Write(t.fd, p)
		switch err {
		case nil:
			return nil
		case unix.EINTR:
			continue
		case unix.EBADFD, unix.ENODEV:
			return fmt.Errorf("write: %w", err)
		}
		// A full queue, an interface that is down, or a header that the kernel
		// refuses.
		return ErrDropped
	}
}

// Interrupt makes Read return.
func (t *tapPort) Interrupt() error { return t.file.SetReadDeadline(time.Unix(1, 0)) }

// Continue undoes Interrupt.
func (t *tapPort) Continue() error { return t.file.SetReadDeadline(time.Time{}) }
