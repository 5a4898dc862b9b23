package vsock

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"

	"github.com/govmm/govmm/virtio"
)

// Kind is the entry of the socket device in a machine's table of devices.
var Kind = virtio.Kind{
	Name:      "vsock",
	Max:       1,
	Usage:     "sockets between host and guest: path=SOCKET[,cid=N] (`VSOCK`)",
	HereUsage: "where the guest's socket device has its socket on this host: path=SOCKET (`VSOCK`; a guest with such a device needs it, or --allow-source-paths)",
	Parse:     parseSpec,
	ParseHere: parseSpec,
	New:       func() virtio.Spec { return new(Spec) },
	NewInfo:   func() virtio.Info { return new(Info) },
}

func parseSpec(words string) (virtio.Spec, error) {
	c, err := ParseConfig(words)
	return &Spec{c}, err
}

// Spec is the socket device in a machine's description.
type Spec struct{ Config }

// Kind implements [virtio.Spec].
func (s *Spec) Kind() string { return Kind.Name }

// String implements [virtio.Spec].
func (s *Spec) String() string { return fmt.Sprintf("vsock cid %d", s.GuestCID()) }

// Words implements [virtio.Worded].
func (s *Spec) Words() string { return s.Config.String() }

// Validate implements [virtio.Spec].
func (s *Spec) Validate() error {
	if err := s.Config.Validate(); err != nil {
		return fmt.Errorf("vsock %s: %w", s.Path, err)
	}
	return nil
}

// MakeAbsolute implements [virtio.Pathed].
func (s *Spec) MakeAbsolute() (err error) {
	if s.Path, err = virtio.Absolute(s.Path); err != nil {
		return fmt.Errorf("vsock %s: %w", s.Path, err)
	}
	return nil
}

// Move implements [virtio.Mover]: the path is the host's, the CID the guest's.
func (s *Spec) Move(here virtio.Spec) error {
	if here == nil {
		if !filepath.IsAbs(s.Path) {
			return fmt.Errorf("vsock %s: expected an absolute path from the source, found a relative one; say where the socket is on this host: --vsock path=SOCKET", s.Path)
		}
		return nil
	}
	h := here.(*Spec)
	if err := h.MakeAbsolute(); err != nil {
		return err
	}
	if h.CID != 0 && h.GuestCID() != s.GuestCID() {
		return fmt.Errorf("vsock %s: the CID is the guest's and cannot change when it moves; it is %d", h.Path, s.GuestCID())
	}
	s.Path = h.Path
	return nil
}

// Renew implements [virtio.Renewer]. The driver reads its CID again when it is told that
// its connections are gone (section 5.10.6.7).
func (s *Spec) Renew(here virtio.Spec) {
	s.Renewed = true
	if h, ok := here.(*Spec); ok && h.CID != 0 {
		s.CID = h.CID
		return
	}
	s.CID = MinCID + rand.Uint32N(MaxCID-MinCID+1)
}

// Later implements [virtio.Latecomer]: the socket is made again when a guest that was
// handed over comes back.
func (s *Spec) Later(bool) virtio.Later {
	return virtio.Later{Replace: []string{filepath.Dir(s.Path)}, Listen: true}
}

// Open implements [virtio.Spec]. The socket is not there yet.
func (s *Spec) Open(log *slog.Logger) (virtio.Backend, error) {
	d, err := New(s.Config, log)
	if err != nil {
		return nil, err
	}
	return &backend{d}, nil
}

// backend is the device with its socket, as its machine's next life uses it
// again.
type backend struct{ *Device }

func (b *backend) Attach(virtio.Guest) (virtio.Device, error) { return b.Device, nil }
func (b *backend) Lock() error                                { return b.Listen() }
func (b *backend) Unlock(context.Context) error               { return b.Unlisten() }

// Info describes the socket device.
type Info struct {
	CID  uint64 `json:"cid"`  // of the guest
	Path string `json:"path"` // of the host's socket
}

// Info implements [virtio.Backend].
func (b *backend) Info() virtio.Info {
	return &Info{CID: uint64(b.Config().GuestCID()), Path: b.Config().Path}
}

// Lines implements [virtio.Info].
func (i *Info) Lines() []string { return []string{fmt.Sprintf("cid %d, %s", i.CID, i.Path)} }
