package net

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Offloads of if_tun.h that x/sys does not define (Linux 6.2).
const (
	tunFUSO4 = 0x20
	tunFUSO6 = 0x40
)

// Tap is a tap device of the host, with struct virtio_net_hdr in front of each
// frame (IFF_VNET_HDR). It implements [Backend].
//
// A tap that was opened gets no frames, and what others use of it stays as it is,
// until [Tap.Take]. So the destination of a migration can open a tap, and report what
// is wrong with it, while the guest runs elsewhere.
type Tap struct {
	name  string
	index int // of the interface
	opt   Options
	made  bool // by this process
	// inherited says that the queues are those of another process of this host, which may be
	// using them until the tap is taken.
	inherited bool
	multi     bool // several queues can be opened (IFF_MULTI_QUEUE)
	mtu       uint16
	offloads  uint64
	ports     []*tapPort
	links     *netlink.Handle // of the network namespace that the tap is in
	watch     *linkWatch
	macvtap   *macvtap // nil: it is a tap

	queues   sync.Mutex // guards all below, and orders attaching and detaching
	onLink   func(up bool)
	linkUp   bool // as onLink was told
	taken    bool
	ready    bool // it has been taken before
	pairs    int  // ports that are to be attached while it is taken
	attached int  // ports that are
	given    bool // another process has descriptors, and may go on with them
}

// tapPort is one queue of a tap (IFF_MULTI_QUEUE).
type tapPort struct {
	fd   int
	file *os.File // of fd; nil until it is a queue
	raw  syscall.RawConn

	// The Read under way.
	read func(fd uintptr) bool
	p    []byte
	idle func()
	n    int
	err  error
}

// maxQueued is more frames than wait in a tap: by default, 500 (TUN_READQ_SIZE).
const maxQueued = 4096

const tunDevice = "/dev/net/tun"

// openQueues opens the queues of the tap, and makes the tap if it does not exist. Its
// name may be a pattern such as tap%d. If the tap can have several queues, they stay
// detached. shared says that others have queues of it: then ours become queues of the
// tap only when it is taken, since to be attached for a moment takes frames from the
// others.
func (t *Tap) openQueues(shared bool) error {
	for i := range t.opt.Queues {
		fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return tapError(t.name, &os.PathError{Op: "open", Path: tunDevice, Err: err})
		}
		p := &tapPort{fd: fd}
		t.ports = append(t.ports, p)
		if shared {
			if t.offloads, err = knownOffloads(fd); err != nil {
				return tapError(t.name, err)
			}
			continue
		}
		if err := t.join(p, unix.IFF_NO_CARRIER); err != nil { // Linux 6.2; before, it has one until reserve
			return tapError(t.name, err)
		}
		t.attached = i + 1
		if i == 0 {
			err = t.reserve()
		}
		if err == nil && t.multi {
			err = t.setQueue(i, unix.IFF_DETACH_QUEUE)
			t.attached = 0
		}
		if err != nil {
			return fmt.Errorf("tap %s: %w", t.name, err)
		}
	}
	return nil
}

// join makes a port a queue of the tap, which is attached then.
func (t *Tap) join(p *tapPort, flags uint16) error {
	flags |= unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	if t.multi {
		flags |= unix.IFF_MULTI_QUEUE
	}
	req, err := unix.NewIfreq(t.name)
	if err == nil {
		req.SetUint16(flags)
		err = unix.IoctlIfreq(p.fd, unix.TUNSETIFF, req)
	}
	if err == nil {
		t.name = req.Name()
		err = p.start(tunDevice)
	}
	return err
}

// newPort takes over fd, which does not block and reads and writes one frame per
// call.
func newPort(fd int, device string) (*tapPort, error) {
	p := &tapPort{fd: fd}
	if err := p.start(device); err != nil {
		return nil, errors.Join(err, p.close())
	}
	return p, nil
}

// start gives the descriptor to Go's poller: a queue cannot be polled before it is one.
func (p *tapPort) start(device string) (err error) {
	p.file = os.NewFile(uintptr(p.fd), device)
	p.read = p.readOnce
	p.raw, err = p.file.SyscallConn()
	return err
}

func (p *tapPort) close() error {
	if p.file == nil {
		return unix.Close(p.fd)
	}
	return p.file.Close()
}

// reserve finds the offloads of the host by trying them on a tap that nobody else
// uses, and takes its carrier away.
func (t *Tap) reserve() error {
	all := []uint64{guestOffloads, guestOffloads &^ (FeatureGuestUSO4 | FeatureGuestUSO6), FeatureGuestCsum}
	for _, guest := range all {
		if t.SetOffloads(guest) == nil {
			t.offloads = withHost(guest)
			break
		}
	}
	return errors.Join(t.SetOffloads(0), t.setCarrier(false))
}

// knownOffloads are the offloads of this host's kernel, without trying them on a tap
// that others use. UDP segmentation is of the same version as IFF_NO_CARRIER.
func knownOffloads(fd int) (uint64, error) {
	flags, err := unix.IoctlGetInt(fd, unix.TUNGETFEATURES)
	if err != nil {
		return 0, fmt.Errorf("TUNGETFEATURES: %w", err)
	}
	if flags&unix.IFF_NO_CARRIER == 0 {
		return withHost(guestOffloads &^ (FeatureGuestUSO4 | FeatureGuestUSO6)), nil
	}
	return withHost(guestOffloads), nil
}

// withHost adds the Host features that go with Guest features.
func withHost(offloads uint64) uint64 {
	for _, pair := range []struct{ guest, host uint64 }{
		{FeatureGuestCsum, FeatureCsum},
		{FeatureGuestTSO4, FeatureHostTSO4},
		{FeatureGuestTSO6, FeatureHostTSO6},
		{FeatureGuestECN, FeatureHostECN},
		{FeatureGuestUSO4, FeatureHostUSO},
	} {
		if offloads&pair.guest != 0 {
			offloads |= pair.host
		}
	}
	return offloads
}

// Name is the name for users.
func (t *Tap) Name() string {
	if t.macvtap != nil {
		return "macvtap " + t.name
	}
	return "tap " + t.name
}

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

// SetPairs attaches the first n queues and detaches the others (TUNSETQUEUE), now or
// when the tap is taken.
func (t *Tap) SetPairs(n int) error {
	t.queues.Lock()
	defer t.queues.Unlock()
	if n < 1 || n > len(t.ports) {
		return fmt.Errorf("%d queues of %d", n, len(t.ports))
	}
	t.pairs = n
	if !t.taken {
		return nil
	}
	return t.attach(n)
}

// attach attaches the first n queues and no others. queues is held.
func (t *Tap) attach(n int) error {
	if !t.multi {
		return nil
	}
	if n > 0 {
		if err := t.joinAll(); err != nil {
			return err
		}
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

// joinAll makes all ports queues of the tap that are not yet. queues is held.
func (t *Tap) joinAll() error {
	for _, p := range t.ports {
		if p.file != nil {
			continue
		}
		if err := t.join(p, 0); err != nil {
			return err
		}
		t.attached++
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
		if t.inherited && errors.Is(err, unix.EINVAL) {
			return nil // the process before has left it so
		}
		return fmt.Errorf("TUNSETQUEUE of queue %d: %w", i, err)
	}
	return nil
}

// setCarrier plugs the cable in or out. Kernels before 5.0 cannot: there it is always in.
func (t *Tap) setCarrier(on bool) error {
	v := 0
	if on {
		v = 1
	}
	if err := unix.IoctlSetPointerInt(t.ports[0].fd, unix.TUNSETCARRIER, v); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("TUNSETCARRIER %d: %w", v, err)
	}
	return nil
}

// discard drops the frames that wait in a port, and at most as many as could wait.
func (t *tapPort) discard(most int) {
	var p [HeaderBytes]byte
	for range most {
		if _, err := unix.Read(t.fd, p[:]); err != nil && err != unix.EINTR {
			return
		}
	}
}

// Close closes the tap. A tap without an owner that was made here disappears, as does a
// macvtap.
func (t *Tap) Close() error {
	var errs []error
	if t.watch != nil {
		errs = append(errs, t.watch.close())
	}
	for _, p := range t.ports {
		errs = append(errs, p.close())
	}
	if t.links != nil {
		t.links.Close()
	}
	if t.macvtap != nil && t.opt.macvtap == nil { // otherwise another guest may come to it
		if t.given || t.inherited && !t.ready {
			errs = append(errs, t.macvtap.close(), t.macvtap.keeper.Close())
		} else {
			errs = append(errs, t.macvtap.end())
		}
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
