package net

import (
	"errors"
	"fmt"
	"log/slog"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/virtio"
)

// Kind is the entry of network devices in a machine's table of devices.
var Kind = virtio.Kind{
	Name:      "net",
	Usage:     "a network device: tap[=NAME][,bridge=NAME][,mac=ADDRESS][,mtu=BYTES][,queues=N][,owner=USER] (`NET`; may be given several times)",
	HereUsage: "the guest's tap on this host: tap[=NAME][,bridge=NAME][,owner=USER] (`NET`; once for each, in their order; none: the same names as at the source)",
	Parse:     func(words string) (virtio.Spec, error) { return specOf(ParseOptions(words)) },
	ParseHere: func(words string) (virtio.Spec, error) { return specOf(ParseHostOptions(words)) },
	New:       func() virtio.Spec { return new(Spec) },
	NewInfo:   func() virtio.Info { return new(Info) },
}

func specOf(o Options, err error) (virtio.Spec, error) { return &Spec{Options: o}, err }

// Spec is a network device in a machine's description, and what the guest has
// been told of it.
type Spec struct {
	Options
	// Features are those that the guest was offered; 0: it has not been opened
	// yet.
	Features uint64 `cbor:"features"`
}

// Kind implements [virtio.Spec].
func (s *Spec) Kind() string { return Kind.Name }

// String implements [virtio.Spec].
func (s *Spec) String() string { return "net " + s.MAC.String() }

// Validate implements [virtio.Spec].
func (s *Spec) Validate() error {
	if err := s.Options.Validate(); err != nil {
		return fmt.Errorf("network device %s: %w", s.MAC, err)
	}
	return nil
}

// Uses implements [virtio.Exclusive].
func (s *Spec) Uses() []string {
	if s.Tap == "" {
		return nil
	}
	return []string{"tap " + s.Tap}
}

// Move implements [virtio.Mover]: tap, bridge and owner are the host's.
func (s *Spec) Move(here virtio.Spec) error {
	s.Owner = nil
	if here != nil {
		h := here.(*Spec)
		s.Tap, s.Bridge, s.Owner = h.Tap, h.Bridge, h.Owner
	}
	return nil
}

// Open implements [virtio.Spec].
func (s *Spec) Open(log *slog.Logger) (virtio.Backend, error) {
	tap, err := OpenTap(s.Options)
	if err != nil {
		return nil, err
	}
	d, err := New(Config{Backend: tap, MAC: s.MAC, MTU: s.MTU, Log: log})
	if err != nil {
		return nil, errors.Join(err, tap.Close())
	}
	if missing := s.Features &^ d.Features(); missing != 0 {
		err := fmt.Errorf("%s: this host's kernel lacks offloads that the guest was offered (features %#x)", tap.Name(), missing)
		return nil, errors.Join(err, d.Close())
	}
	if s.Features == 0 {
		s.Features = d.Features()
	}
	return &backend{d, s, tap.Interface()}, nil
}

// backend is a device with its tap, as its machine's next life uses it again.
type backend struct {
	*Device
	spec *Spec
	tap  string // the host's name of it
}

func (b *backend) Attach(virtio.Guest) (virtio.Device, error) {
	return offering{b.Device, b.spec.Features}, nil
}

// offering is a device that offers a guest on this host what it was offered where
// it was started.
type offering struct {
	*Device
	features uint64
}

func (o offering) Features() uint64 { return o.features }

// Info describes a network device. The counters are of this process, in frames
// and bytes, received and sent by the guest.
type Info struct {
	MAC       string `json:"mac"`
	Tap       string `json:"tap"`              // the host's interface
	Bridge    string `json:"bridge,omitempty"` // if govmm made the tap its port
	MTU       uint16 `json:"mtu,omitempty"`    // 0: the tap's own
	Queues    int    `json:"queues"`           // pairs
	RxFrames  uint64 `json:"rx_frames"`
	RxBytes   uint64 `json:"rx_bytes"`
	RxDropped uint64 `json:"rx_dropped"`
	TxFrames  uint64 `json:"tx_frames"`
	TxBytes   uint64 `json:"tx_bytes"`
	TxDropped uint64 `json:"tx_dropped"`
}

// Info implements [virtio.Backend].
func (b *backend) Info() virtio.Info {
	c, s := b.Counters(), b.spec
	return &Info{MAC: s.MAC.String(), Tap: b.tap, Bridge: s.Bridge, MTU: s.MTU, Queues: s.Queues,
		RxFrames: c.RxFrames, RxBytes: c.RxBytes, RxDropped: c.RxDropped, TxFrames: c.TxFrames, TxBytes: c.TxBytes, TxDropped: c.TxDropped}
}

// Lines implements [virtio.Info].
func (i *Info) Lines() []string {
	what := i.MAC + ", tap " + i.Tap
	if i.Bridge != "" {
		what += ", bridge " + i.Bridge
	}
	return []string{what, fmt.Sprintf("received %d frames (%s), sent %d (%s), dropped %d and %d",
		i.RxFrames, units.Bytes(i.RxBytes), i.TxFrames, units.Bytes(i.TxBytes), i.RxDropped, i.TxDropped)}
}
