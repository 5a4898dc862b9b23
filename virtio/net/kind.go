package net

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/virtio"
)

// Kind is the entry of network devices in a machine's table of devices.
var Kind = virtio.Kind{
	Name:      "net",
	Usage:     "a network device: tap[=NAME][,bridge=NAME][,owner=USER], user[,forward=[udp:][ADDRESS:]PORT:GUESTPORT]...[,host], socket=PATH or macvtap=LINK[,name=NAME], with [,mac=ADDRESS][,mtu=BYTES][,queues=N][,bps=N][,antispoof[,ip=ADDRESS]...] (`NET`; may be given several times)",
	HereUsage: "the guest's network on this host: tap[=NAME][,bridge=NAME][,owner=USER], user[,forward=[udp:][ADDRESS:]PORT:GUESTPORT]...[,host], socket=PATH or macvtap=LINK[,name=NAME], with [,mac=ADDRESS][,bps=N][,antispoof[,ip=ADDRESS]...] (`NET`; once for each, in their order; a guest with a network device needs it, or --allow-source-paths)",
	Parse:     func(words string) (virtio.Spec, error) { return specOf(ParseOptions(words)) },
	ParseHere: func(words string) (virtio.Spec, error) { return specOf(ParseHostOptions(words)) },
	New:       func() virtio.Spec { return new(Spec) },
	NewInfo:   func() virtio.Info { return new(Info) },
	Features:  []string{"user", "socket", "macvtap"},
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

// DeviceName implements [virtio.Named].
func (s *Spec) DeviceName() string { return s.MAC.String() }

// ForDevice implements [virtio.Named]: an address that is given is that of the device.
func (s *Spec) ForDevice() string {
	if s.MAC == (MAC{}) {
		return ""
	}
	return s.MAC.String()
}

// Words implements [virtio.Worded].
func (s *Spec) Words() string { return s.Options.String() }

// Validate implements [virtio.Spec].
func (s *Spec) Validate() error {
	if err := s.Options.Validate(); err != nil {
		return fmt.Errorf("network device %s: %w", s.MAC, err)
	}
	return nil
}

// FeaturesInUse implements [virtio.Featured].
func (s *Spec) FeaturesInUse() []string {
	switch {
	case s.User:
		return []string{"user"}
	case s.Socket != "":
		return []string{"socket"}
	case s.Macvtap != "":
		return []string{"macvtap"}
	}
	return nil
}

// Uses implements [virtio.Exclusive].
func (s *Spec) Uses() []string {
	switch {
	case s.Tap != "":
		return []string{"tap " + s.Tap}
	case s.Socket != "":
		return []string{"socket " + s.Socket}
	case s.Name != "":
		return []string{"macvtap " + s.Name}
	}
	return nil
}

// MakeAbsolute implements [virtio.Pathed].
func (s *Spec) MakeAbsolute() (err error) {
	if s.Socket == "" {
		return nil
	}
	if s.Socket, err = virtio.Absolute(s.Socket); err != nil {
		return fmt.Errorf("net socket=%s: %w", s.Socket, err)
	}
	return nil
}

// Prepare implements [virtio.Preparer].
func (s *Spec) Prepare(inherits bool) (err error) {
	switch {
	case s.User:
		err = s.UserNet.prepare()
	case s.Macvtap != "" && !inherits && s.macvtap == nil:
		s.macvtap, err = newMacvtap(s.Options, MaxQueuePairs)
	}
	return err
}

// Move implements [virtio.Mover]: the way to the network is the host's. The address is the
// guest's, and may have to be the one that is given here.
func (s *Spec) Move(here virtio.Spec) error {
	s.Owner, s.Arriving = nil, true
	if here != nil {
		h := here.(*Spec)
		if h.MAC != (MAC{}) && h.MAC != s.MAC {
			return fmt.Errorf("net %s: the MAC address is the guest's and cannot change when it moves; expected %s as given here, found %s", h.way(), h.MAC, s.MAC)
		}
		s.Tap, s.Bridge, s.Owner, s.Policy = h.Tap, h.Bridge, h.Owner, h.Policy
		s.Socket, s.User, s.UserNet = h.Socket, h.User, h.UserNet
		s.Macvtap, s.Name, s.macvtap = h.Macvtap, h.Name, h.macvtap
	}
	if s.Socket != "" && !filepath.IsAbs(s.Socket) {
		return fmt.Errorf("net socket=%.80q: a relative path names another file on this host; expected an absolute one", s.Socket)
	}
	return nil
}

// Renew implements [virtio.Renewer]. The driver learns that the configuration has changed.
func (s *Spec) Renew(here virtio.Spec) {
	s.MAC, s.Renewed = randomMAC(), true
	if h, ok := here.(*Spec); ok && h.MAC != (MAC{}) {
		s.MAC = h.MAC
	}
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
	if !arrives || s.User || s.Socket != "" {
		return virtio.Later{}
	}
	if s.Macvtap != "" {
		return virtio.Later{Netlink: true}
	}
	return virtio.Later{Write: []string{tunDevice, ipv6Settings}, Netlink: true, NetAdmin: true}
}

// link is what a device's frames go through on this host.
type link interface {
	Backend
	// MTU is that of the link, as the guest is told; 0: it is not.
	MTU() uint16
	// OnLink has f called when the link goes down or up. It is up when f is set.
	OnLink(f func(up bool))
	// Take makes it the link of this process, when it has got the right to run the
	// guest; to take it again does nothing. Yield undoes it.
	Take() error
	Yield() error
}

// Open implements [virtio.Spec].
func (s *Spec) Open(log *slog.Logger) (virtio.Backend, error) {
	l, err := s.openLink(log)
	if err != nil {
		return nil, err
	}
	return s.backend(l, log)
}

// backend makes the device with its link.
func (s *Spec) backend(l link, log *slog.Logger) (virtio.Backend, error) {
	d, err := New(Config{Backend: l, MAC: s.MAC, MTU: l.MTU(), Policy: s.Policy, OneMAC: s.Macvtap != "", Log: log})
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	d.renewed = s.Renewed
	if err := s.lacks(d); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	l.OnLink(d.SetLink)
	if s.User || s.Socket != "" { // whoever is there again is another one
		l.OnLink(func(up bool) {
			if up {
				d.reconnected()
			} else {
				d.SetLink(false)
			}
		})
	}
	b := &backend{Device: d, spec: s, link: l}
	if tap, ok := l.(*Tap); ok {
		return tapBackend{b, tap}, nil
	}
	return b, nil
}

// openLink opens the way to the network.
func (s *Spec) openLink(log *slog.Logger) (link, error) {
	switch {
	case s.User:
		return orNil(openUser(s.Options, log))
	case s.Socket != "":
		return orNil(openSocket(s.Options, log))
	}
	return orNil(OpenTap(s.Options))
}

// orNil keeps a nil pointer from being an interface that is not nil.
func orNil[L link](l L, err error) (link, error) {
	if err != nil {
		return nil, err
	}
	return l, nil
}

// lacks reports what the guest uses and a device of this host does not have.
func (s *Spec) lacks(d *Device) error {
	missing := s.Features &^ d.Features()
	switch {
	case missing == 0:
		return nil
	case s.User || s.Socket != "":
		return fmt.Errorf("%s: has not what the guest's driver uses: %s", d.cfg.Backend.Name(), featureNames(missing))
	}
	return fmt.Errorf("%s: this host's kernel lacks what the guest's driver uses: %s", d.cfg.Backend.Name(), featureNames(missing))
}

// backend is a device with its link, as its machine's next life uses it again.
type backend struct {
	*Device
	spec *Spec
	link link
	held bool // the link was taken before
}

func (b *backend) Attach(virtio.Guest) (virtio.Device, error) { return b.Device, nil }

// Lock implements [virtio.Locker]: the link is that of the side that has the right
// to run the guest, and of no other. A guest whose link fails when it is taken back goes
// on without one.
func (b *backend) Lock() error {
	if b.gone.Load() {
		return nil
	}
	err := b.link.Take()
	if err != nil && b.held {
		b.lost(err)
		return nil
	}
	b.held = b.held || err == nil
	return err
}

// Unlock implements [virtio.Locker].
func (b *backend) Unlock(context.Context) error { return b.link.Yield() }

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
	MAC string `json:"mac"`
	Tap string `json:"tap"` // the host's interface; "" if there is none
	// Macvtap is the interface that Tap, a macvtap, is on; "": it is a tap.
	Macvtap string `json:"macvtap,omitempty"`
	Bridge  string `json:"bridge,omitempty"` // if govmm made the tap its port
	Socket  string `json:"socket,omitempty"` // the path
	// User says that the network is in a process of its own, with these forwards.
	User      bool     `json:"user,omitempty"`
	Forwards  []string `json:"forwards,omitempty"`
	MTU       uint16   `json:"mtu,omitempty"`    // as the guest is told
	Queues    int      `json:"queues"`           // pairs
	Policy    string   `json:"policy,omitempty"` // of this host, for people
	RxFrames  uint64   `json:"rx_frames"`
	RxBytes   uint64   `json:"rx_bytes"`
	RxDropped uint64   `json:"rx_dropped"`
	TxFrames  uint64   `json:"tx_frames"`
	TxBytes   uint64   `json:"tx_bytes"`
	TxDropped uint64   `json:"tx_dropped"`
	TxForeign uint64   `json:"tx_foreign,omitempty"` // not the guest's own
}

// Info implements [virtio.Backend].
func (b *backend) Info() virtio.Info {
	c, s := b.Counters(), b.spec
	i := &Info{MAC: s.MAC.String(), Bridge: s.Bridge, Socket: s.Socket, User: s.User, MTU: b.cfg.MTU, Queues: s.Queues, Policy: s.Policy.describe(),
		RxFrames: c.RxFrames, RxBytes: c.RxBytes, RxDropped: c.RxDropped, TxFrames: c.TxFrames, TxBytes: c.TxBytes, TxDropped: c.TxDropped, TxForeign: c.TxForeign}
	if t, ok := b.link.(*Tap); ok {
		i.Tap = t.Interface()
		if t.macvtap != nil {
			i.Macvtap = t.macvtap.on
		}
	}
	var net UserNet
	if l, ok := b.link.(*userLink); ok {
		net = l.net
	}
	for _, f := range net.Forwards {
		i.Forwards = append(i.Forwards, f.String())
	}
	return i
}

// Lines implements [virtio.Info].
func (i *Info) Lines() []string {
	what := i.MAC
	switch {
	case i.User:
		what += ", user"
	case i.Socket != "":
		what += ", socket " + i.Socket
	case i.Macvtap != "":
		what += ", macvtap " + i.Tap + " on " + i.Macvtap
	default:
		what += ", tap " + i.Tap
	}
	for _, f := range i.Forwards {
		what += ", forward " + f
	}
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
