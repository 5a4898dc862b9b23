package net

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/virtio"
)

// Kind is the entry of network devices in a machine's table of devices.
var Kind = virtio.Kind{
	Name:      "net",
	Usage:     "a network device: tap[=NAME][,bridge=NAME][,mac=ADDRESS][,mtu=BYTES][,queues=N][,owner=USER][,bps=N][,antispoof[,ip=ADDRESS]...] (`NET`; may be given several times)",
	HereUsage: "the guest's tap on this host: tap[=NAME][,bridge=NAME][,mac=ADDRESS][,owner=USER][,bps=N][,antispoof[,ip=ADDRESS]...] (`NET`; once for each, in their order; a guest with a network device needs it, or --allow-source-paths)",
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
	// Features are those that the guest's driver uses, or may be about to use, when it
	// is migrated: a host that lacks one refuses the guest. Otherwise 0.
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

// Move implements [virtio.Mover]: tap, bridge and owner are the host's. The address is
// the guest's, and may have to be the one that is given here.
func (s *Spec) Move(here virtio.Spec) error {
	s.Owner, s.Arriving = nil, true
	if here != nil {
		h := here.(*Spec)
		if h.MAC != (MAC{}) && h.MAC != s.MAC {
			return fmt.Errorf("net tap=%s: the MAC address is the guest's and cannot change when it moves; expected %s as given here, found %s", h.Tap, h.MAC, s.MAC)
		}
		s.Tap, s.Bridge, s.Owner, s.Policy = h.Tap, h.Bridge, h.Owner, h.Policy
	}
	return nil
}

// Negotiated implements [virtio.Negotiated]: what the driver has taken is what another
// host must have, and what it has not taken nobody needs. That includes the MTU, unless
// the user has asked for it.
func (s *Spec) Negotiated(d virtio.Device, features uint64) virtio.Spec {
	n, dev := *s, d.(*Device)
	n.Features = features & dev.Features()
	if n.Features&FeatureMTU != 0 {
		n.MTU = dev.cfg.MTU
	}
	return &n
}

// Later implements [virtio.Latecomer].
func (s *Spec) Later(arrives bool) virtio.Later {
	if !arrives {
		return virtio.Later{}
	}
	return virtio.Later{Write: []string{tunDevice, ipv6Settings}, Netlink: true, NetAdmin: true}
}

// Open implements [virtio.Spec].
func (s *Spec) Open(log *slog.Logger) (virtio.Backend, error) {
	tap, err := OpenTap(s.Options)
	if err != nil {
		return nil, err
	}
	return s.backend(tap, log)
}

// backend makes the device with its tap.
func (s *Spec) backend(tap *Tap, log *slog.Logger) (virtio.Backend, error) {
	d, err := New(Config{Backend: tap, MAC: s.MAC, MTU: tap.MTU(), Policy: s.Policy, Log: log})
	if err != nil {
		return nil, errors.Join(err, tap.Close())
	}
	if err := s.lacks(d); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	tap.OnLink(d.SetLink)
	return &backend{Device: d, spec: s, tap: tap}, nil
}

// lacks reports what the guest uses and a device of this host does not have.
func (s *Spec) lacks(d *Device) error {
	if missing := s.Features &^ d.Features(); missing != 0 {
		return fmt.Errorf("%s: this host's kernel lacks what the guest's driver uses: %s", d.cfg.Backend.Name(), featureNames(missing))
	}
	return nil
}

// backend is a device with its tap, as its machine's next life uses it again.
type backend struct {
	*Device
	spec *Spec
	tap  *Tap
	held bool // the tap was taken before
}

func (b *backend) Attach(virtio.Guest) (virtio.Device, error) { return b.Device, nil }

// Lock implements [virtio.Locker]: the tap is the link of the side that has the right
// to run the guest, and of no other. A guest whose tap fails when it is taken back goes
// on without a link.
func (b *backend) Lock() error {
	if b.gone.Load() {
		return nil
	}
	err := b.tap.Take()
	if err != nil && b.held {
		b.lost(err)
		return nil
	}
	b.held = b.held || err == nil
	return err
}

// Unlock implements [virtio.Locker].
func (b *backend) Unlock(context.Context) error { return b.tap.Yield() }

// featureNames are the names of features, as in section 5.1.3.
func featureNames(features uint64) string {
	names := map[uint64]string{
		FeatureCsum: "CSUM", FeatureGuestCsum: "GUEST_CSUM", FeatureCtrlGuestOffloads: "CTRL_GUEST_OFFLOADS", FeatureMTU: "MTU",
		FeatureGuestTSO4: "GUEST_TSO4", FeatureGuestTSO6: "GUEST_TSO6", FeatureGuestECN: "GUEST_ECN",
		FeatureHostTSO4: "HOST_TSO4", FeatureHostTSO6: "HOST_TSO6", FeatureHostECN: "HOST_ECN", FeatureMultiQueue: "MQ",
		FeatureGuestUSO4: "GUEST_USO4", FeatureGuestUSO6: "GUEST_USO6", FeatureHostUSO: "HOST_USO",
	}
	var all []string
	for bit := range 64 {
		f := uint64(1) << bit
		if name := names[f]; features&f != 0 && name != "" {
			all = append(all, "VIRTIO_NET_F_"+name)
		} else if features&f != 0 {
			all = append(all, fmt.Sprintf("bit %d", bit))
		}
	}
	return strings.Join(all, ", ")
}

// Info describes a network device. The counters are of this process, in frames
// and bytes, received and sent by the guest.
type Info struct {
	MAC       string `json:"mac"`
	Tap       string `json:"tap"`              // the host's interface
	Bridge    string `json:"bridge,omitempty"` // if govmm made the tap its port
	MTU       uint16 `json:"mtu,omitempty"`    // as the guest is told
	Queues    int    `json:"queues"`           // pairs
	Policy    string `json:"policy,omitempty"` // of this host, for people
	RxFrames  uint64 `json:"rx_frames"`
	RxBytes   uint64 `json:"rx_bytes"`
	RxDropped uint64 `json:"rx_dropped"`
	TxFrames  uint64 `json:"tx_frames"`
	TxBytes   uint64 `json:"tx_bytes"`
	TxDropped uint64 `json:"tx_dropped"`
	TxForeign uint64 `json:"tx_foreign,omitempty"` // not the guest's own
}

// Info implements [virtio.Backend].
func (b *backend) Info() virtio.Info {
	c, s := b.Counters(), b.spec
	return &Info{MAC: s.MAC.String(), Tap: b.tap.Interface(), Bridge: s.Bridge, MTU: b.cfg.MTU, Queues: s.Queues, Policy: s.Policy.describe(),
		RxFrames: c.RxFrames, RxBytes: c.RxBytes, RxDropped: c.RxDropped, TxFrames: c.TxFrames, TxBytes: c.TxBytes, TxDropped: c.TxDropped, TxForeign: c.TxForeign}
}

// Lines implements [virtio.Info].
func (i *Info) Lines() []string {
	what := i.MAC + ", tap " + i.Tap
	if i.Bridge != "" {
		what += ", bridge " + i.Bridge
	}
	if i.Policy != "" {
		what += ", " + i.Policy
	}
	lines := []string{what, fmt.Sprintf("received %d frames (%s), sent %d (%s), dropped %d and %d",
		i.RxFrames, units.Bytes(i.RxBytes), i.TxFrames, units.Bytes(i.TxBytes), i.RxDropped, i.TxDropped)}
	if i.TxForeign != 0 {
		lines = append(lines, fmt.Sprintf("refused %d frames that were not its own", i.TxForeign))
	}
	return lines
}
