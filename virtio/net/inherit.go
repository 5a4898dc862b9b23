package net

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/govmm/govmm/internal/netproc"
	"github.com/govmm/govmm/virtio"
	"golang.org/x/sys/unix"
)

var (
	_ virtio.Inheritable = tapBackend{}
	_ virtio.Heir        = (*Spec)(nil)
)

// tapBackend is a backend whose descriptors another process can go on with.
type tapBackend struct {
	*backend
	tap *Tap
}

// Descriptors implements [virtio.Inheritable]: the queues of the tap, which nobody can open
// a second time if it is the only one. The tap and what waits in it stay as they are.
func (b tapBackend) Descriptors() ([]uintptr, error) {
	if b.gone.Load() {
		return nil, fmt.Errorf("%s: its tap is gone", b.link.Name())
	}
	t := b.tap
	t.queues.Lock()
	defer t.queues.Unlock()
	if err := t.joinAll(); err != nil { // those that were never used
		return nil, tapError(t.name, err)
	}
	if err := t.attach(t.pairs); err != nil {
		return nil, tapError(t.name, err)
	}
	var all []uintptr
	for _, p := range t.ports {
		all = append(all, uintptr(p.fd))
	}
	if t.macvtap != nil {
		t.given = true
		keeper, err := t.macvtap.keeper.Descriptor()
		if err != nil {
			return nil, tapError(t.name, err)
		}
		all = append(all, keeper)
	}
	return all, nil
}

// Inherit implements [virtio.Heir].
func (s *Spec) Inherit(files []*os.File, log *slog.Logger) (virtio.Backend, error) {
	tap, err := inheritTap(s.Options, files)
	if err != nil {
		return nil, err
	}
	return s.backend(tap, log)
}

// inheritTap is [OpenTap] with the queues of another process. Nothing of the tap is changed
// before [Tap.Take].
func inheritTap(o Options, files []*os.File) (_ *Tap, err error) {
	defer virtio.CloseFiles(files)
	t := &Tap{name: o.Tap, opt: o, multi: o.Queues > 1, mtu: o.MTU, pairs: 1, inherited: true}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: take it over: %w", t.Name(), err), t.Close())
		}
	}()
	if o.Macvtap != "" {
		t.opt.macvtap = nil
		if files, err = t.inheritKeeper(files); err != nil {
			return nil, err
		}
	}
	if len(files) != o.Queues || len(files) == 0 {
		return nil, fmt.Errorf("expected %d queues, found %d", o.Queues, len(files))
	}
	for _, f := range files {
		req, err := unix.NewIfreq("")
		if err == nil {
			err = unix.IoctlIfreq(int(f.Fd()), unix.TUNGETIFF, req)
		}
		if err != nil {
			return nil, fmt.Errorf("TUNGETIFF: %w", err)
		}
		const format = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
		if flags := req.Uint16(); flags&format != format || len(files) > 1 && flags&unix.IFF_MULTI_QUEUE == 0 || t.index != 0 && req.Name() != t.name {
			return nil, fmt.Errorf("expected queues of one tap with headers, found one of %s with flags %#x", req.Name(), flags)
		}
		t.name, t.multi = req.Name(), req.Uint16()&unix.IFF_MULTI_QUEUE != 0
		t.index = -1 // not looked up yet
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			err = unix.SetNonblock(fd, true)
		}
		if err != nil {
			return nil, err
		}
		p, err := newPort(fd, tunDevice)
		if err != nil {
			return nil, err
		}
		t.ports = append(t.ports, p)
	}
	if t.offloads, err = knownOffloads(t.ports[0].fd); err != nil {
		return nil, err
	}
	if t.macvtap != nil && uso() {
		t.offloads = withHost(guestOffloads)
	}
	if err := t.followLinks(); err != nil {
		return nil, err
	}
	link, err := t.links.LinkByName(t.name)
	if err != nil {
		return nil, fmt.Errorf("%w (is this another network namespace?)", err)
	}
	t.index = link.Attrs().Index
	if t.macvtap != nil {
		t.macvtap.name, t.macvtap.index = t.name, t.index
	}
	if t.mtu == 0 {
		t.mtu = mtuOf(link)
	}
	return t, nil
}

// inheritKeeper takes the last of the files, by which the process that keeps a macvtap is
// told what to do, and returns the others.
func (t *Tap) inheritKeeper(files []*os.File) ([]*os.File, error) {
	if len(files) == 0 {
		return nil, errors.New("expected the one that is told what to do with it, found none")
	}
	last := len(files) - 1
	fd, err := unix.FcntlInt(files[last].Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	keeper, err := netproc.OpenMessages(fd)
	if err != nil {
		return nil, err
	}
	t.macvtap = &macvtap{on: t.opt.Macvtap, keeper: keeper}
	return files[:last], nil
}
