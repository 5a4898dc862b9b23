package blk

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/govmm/govmm/virtio"
	"golang.org/x/sys/unix"
)

var (
	_ virtio.Inheritable = (*backend)(nil)
	_ virtio.Heir        = (*Spec)(nil)
)

// Descriptors implements [virtio.Inheritable]: the image, and what claims a block device.
// The lock on the image is one of its open file description and goes along.
func (b *backend) Descriptors() ([]uintptr, error) {
	if b.image.over != nil {
		return nil, fmt.Errorf("%s: it is ephemeral, and what the guest has written to it is known to this process only", b.spec)
	}
	if untold := b.flushes.untold.Load(); untold != nil {
		return nil, fmt.Errorf("%s: flush: %w: writes may be lost, and the guest learns of it when it flushes next", b.spec, *untold)
	}
	l := &b.image.lock
	l.holderMu.Lock()
	defer l.holderMu.Unlock()
	all := []uintptr{uintptr(b.image.fd)}
	if l.claim >= 0 {
		all = append(all, uintptr(l.claim))
	}
	return all, nil
}

// Inherit implements [virtio.Heir].
func (s *Spec) Inherit(files []*os.File, log *slog.Logger) (virtio.Backend, error) {
	defer virtio.CloseFiles(files)
	c := s.Config
	c.Raw = true
	im, err := inheritImage(c, files)
	if err != nil {
		return nil, fmt.Errorf("disk %s: take it over: %w", c.Path, err)
	}
	d := newDevice(c, im, log)
	if d.Size() != s.Size {
		_ = d.Close()
		return nil, fmt.Errorf("disk %s: take it over: expected %d bytes, found %d", s.Path, s.Size, d.Size())
	}
	return &backend{d, s}, nil
}

// inheritImage is openImage with descriptors that are open.
func inheritImage(c Config, files []*os.File) (*image, error) {
	if n := len(files); n < 1 || n > 2 {
		return nil, fmt.Errorf("expected one descriptor, or two for a block device; found %d", n)
	}
	flags, err := unix.FcntlInt(files[0].Fd(), unix.F_GETFL, 0)
	if err != nil {
		return nil, err
	}
	if writable := flags&unix.O_ACCMODE == unix.O_RDWR; writable == c.ReadOnly || c.Direct != (flags&unix.O_DIRECT != 0) {
		return nil, fmt.Errorf("it is open in another way than the guest's disk (flags %#o)", flags)
	}
	im := &image{path: c.Path, readOnly: c.ReadOnly, direct: c.Direct, offsetAlign: 1, memAlign: 1, fdatasync: unix.Fdatasync}
	im.lock.claim, im.lock.inherited = -1, true
	if im.fd, err = duplicate(files[0]); err != nil {
		return nil, err
	}
	if len(files) == 2 {
		im.lock.claim, err = duplicate(files[1])
	}
	if err == nil {
		err = im.inspect(c)
	}
	if err != nil {
		_ = im.close()
		return nil, err
	}
	return im, nil
}

func duplicate(f *os.File) (int, error) { return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) }
