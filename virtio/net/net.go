// Package net is the network device, virtio 1.2 section 5.1, and the tap
// devices of the host that it sends to and receives from.
//
// A frame is an Ethernet frame with a struct virtio_net_hdr in front of it
// ([HeaderBytes]), both to the guest and to the tap: the header says what one side
// leaves to the other (checksums, segmentation). Frames are copied once, through a
// buffer of each queue. A frame allocates nothing.
package net

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	stdnet "net"
	"sync"
	"sync/atomic"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/limit"
)

// Feature bits, section 5.1.3.
const (
	FeatureCsum               uint64 = 1 << 0 // the device takes frames without a checksum
	FeatureGuestCsum          uint64 = 1 << 1 // the driver takes frames without a checksum
	FeatureCtrlGuestOffloads  uint64 = 1 << 2
	FeatureMTU                uint64 = 1 << 3
	FeatureMAC                uint64 = 1 << 5
	FeatureGuestTSO4          uint64 = 1 << 7
	FeatureGuestTSO6          uint64 = 1 << 8
	FeatureGuestECN           uint64 = 1 << 9
	FeatureHostTSO4           uint64 = 1 << 11
	FeatureHostTSO6           uint64 = 1 << 12
	FeatureHostECN            uint64 = 1 << 13
	FeatureMergeableRxBuffers uint64 = 1 << 15
	FeatureStatus             uint64 = 1 << 16
	FeatureCtrlVQ             uint64 = 1 << 17
	FeatureGuestAnnounce      uint64 = 1 << 21
	FeatureMultiQueue         uint64 = 1 << 22
	FeatureCtrlMACAddr        uint64 = 1 << 23
	FeatureGuestUSO4          uint64 = 1 << 54
	FeatureGuestUSO6          uint64 = 1 << 55
	FeatureHostUSO            uint64 = 1 << 56

	// The offloads need support by the backend.
	hostOffloads  = FeatureCsum | FeatureHostTSO4 | FeatureHostTSO6 | FeatureHostECN | FeatureHostUSO
	guestOffloads = FeatureGuestCsum | FeatureGuestTSO4 | FeatureGuestTSO6 | FeatureGuestECN | FeatureGuestUSO4 | FeatureGuestUSO6
)

// Limits.
const (
	// MaxQueuePairs is how many queue pairs a device may have.
	MaxQueuePairs = 16
	// queueSize is the size of the receive and transmit queues.
	queueSize = 256
	// controlSize is the size of the control queue.
	controlSize = 64
	// maxFrame is the longest frame without its header: the longest one that can
	// be segmented, and two VLAN tags (section 5.1.6.3.1).
	maxFrame = 65535 + etherHeader + 8
	// etherHeader is the length of the shortest frame.
	etherHeader = 14
)

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string { return stdnet.HardwareAddr(m[:]).String() }

// ParseMAC reads an address of a single station in the usual notation.
func ParseMAC(s string) (MAC, error) {
	hw, err := stdnet.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return MAC{}, fmt.Errorf("MAC address %q: expected six bytes, as in 52:54:00:12:34:56", s)
	}
	m := MAC(hw)
	if !m.valid() {
		return MAC{}, fmt.Errorf("MAC address %s: not one of a single station", m)
	}
	return m, nil
}

// valid reports whether m is neither a group's address nor zero.
func (m MAC) valid() bool { return m[0]&1 == 0 && m != MAC{} }

// Backend sends and receives frames: a tap, see [OpenTap].
type Backend interface {
	// Name is the name for users.
	Name() string
	// Ports are the queues, one for each queue pair of the device.
	Ports() []Port
	// Offloads are the features that it supports, among Csum and those that
	// begin with Guest and Host.
	Offloads() uint64
	// SetOffloads says which Guest features the guest accepts now.
	SetOffloads(guest uint64) error
	// SetPairs attaches the first n ports and detaches the others. Frames
	// arrive at attached ports only.
	SetPairs(n int) error
	// Close releases it.
	Close() error
}

// Port is one queue of a backend. One goroutine at a time calls Read; any calls
// the other methods.
type Port interface {
	// Read waits for a frame, and truncates it to len(p). It calls idle before
	// it waits. It fails with [ErrInterrupted] after Interrupt until Continue.
	// Any other error is the end of the backend.
	Read(p []byte, idle func()) (int, error)
	// Write sends a frame and does not wait. It fails with [ErrDropped] if the
	// host is full or does not accept the frame. Any other error is the end of
	// the backend.
	Write(p []byte) error
	// Interrupt makes Read return, until Continue.
	Interrupt() error
	// Continue undoes Interrupt.
	Continue() error
}

var (
	// ErrInterrupted: Interrupt has ended a Read.
	ErrInterrupted = errors.New("interrupted")
	// ErrDropped: the host did not accept a frame.
	ErrDropped = errors.New("the frame was dropped")
)

// Config configures a device.
type Config struct {
	Backend Backend // required; Close of the device closes it
	MAC     MAC     // required; the guest may change it
	MTU     uint16  // that of the guest's link; 0: the guest is not told, and may send any
	Policy  Policy
	// OneMAC says that the backend gets what is sent to MAC and no other address, so that the
	// guest may not change its own.
	OneMAC bool
	Log    *slog.Logger // nil: nothing is logged
}

// Device is the network device. It implements virtio.Device.
type Device struct {
	cfg   Config
	ports []Port
	// toGuest and fromGuest keep a direction to its limit, all queues together; nil: none.
	toGuest, fromGuest *limit.Limiter
	guard              *guard // nil: the guest may send anything

	config   sync.Mutex // guards the fields down to notifier
	state    State
	hostUp   bool // the host's end of the link is up
	renewed  bool // its address is another one than that of the state that is loaded
	arrived  bool // the state was loaded, and the driver has not been told of what is new here
	features uint64
	notifier virtio.Notifier // nil when not active

	linkUp atomic.Bool  // a copy of state.Status's bit, for every frame
	pairs  atomic.Int32 // a copy of state.Pairs
	gone   atomic.Bool  // the backend has gone, which was logged

	// What follows belongs to the transport's calls, one at a time; receivers
	// and loop are also used by the control queue's task, which has ended
	// before they change.
	loop         *virtio.Loop // nil when not active
	receivers    []*receiver
	announcement *announcement

	counters counters
}

// Status bits of the configuration, section 5.1.4.
const (
	statusLinkUp   = 1
	statusAnnounce = 2
)

// New makes a device.
func New(cfg Config) (*Device, error) {
	if cfg.Backend == nil {
		return nil, errors.New("net: needs a backend")
	}
	ports := cfg.Backend.Ports()
	if len(ports) < 1 || len(ports) > MaxQueuePairs {
		return nil, fmt.Errorf("net %s: the number of queue pairs must be between 1 and %d, got %d", cfg.Backend.Name(), MaxQueuePairs, len(ports))
	}
	if !cfg.MAC.valid() {
		return nil, fmt.Errorf("net %s: MAC address %s is not one of a single station", cfg.Backend.Name(), cfg.MAC)
	}
	if cfg.MTU != 0 && cfg.MTU < minMTU {
		return nil, fmt.Errorf("net %s: the MTU must be at least %d, got %d", cfg.Backend.Name(), minMTU, cfg.MTU)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	d := &Device{cfg: cfg, ports: ports, hostUp: true,
		toGuest: cfg.Policy.Limit.Limiter(), fromGuest: cfg.Policy.Limit.Limiter(), guard: newGuard(cfg.Policy, cfg.MAC)}
	d.setState(d.fresh())
	return d, nil
}

// minMTU is the smallest MTU of IPv4 (section 5.1.4.1).
const minMTU = 68

// SetLink sets the link up or down. While it is down, frames are dropped both
// ways.
func (d *Device) SetLink(up bool) {
	d.changeConfig(func(s *State) {
		d.hostUp = up
		s.Status = d.withLink(s.Status)
	})
}

// withLink is a status with the link as it is on this host, now. config is held, or d
// is new.
func (d *Device) withLink(status uint16) uint16 {
	if d.hostUp && !d.gone.Load() {
		return status | statusLinkUp
	}
	return status &^ statusLinkUp
}

// MAC is the guest's current address.
func (d *Device) MAC() MAC {
	d.config.Lock()
	defer d.config.Unlock()
	return d.state.MAC
}

// setState sets the state and the copies of it. config is held, or d is new.
func (d *Device) setState(s State) {
	d.state = s
	d.linkUp.Store(s.Status&statusLinkUp != 0)
	d.pairs.Store(int32(s.Pairs))
}

// changeConfig changes the configuration structure and tells the driver, if there
// is one.
func (d *Device) changeConfig(change func(*State)) {
	d.config.Lock()
	s := d.state
	change(&s)
	d.setState(s)
	n := d.notifier
	d.config.Unlock()
	if n != nil {
		n.ConfigChanged()
	}
}

// lost logs once that the backend has gone, and sets the link down.
func (d *Device) lost(err error) {
	if d.gone.Swap(true) {
		return
	}
	d.cfg.Log.Error("the backend is gone, the guest's link is down", "device", d.cfg.Backend.Name(), "err", err)
	d.SetLink(false)
}

// ReadConfig fills p from struct virtio_net_config, section 5.1.4.
func (d *Device) ReadConfig(off uint32, p []byte) {
	var c [12]byte
	d.config.Lock()
	copy(c[:], d.state.MAC[:])
	binary.LittleEndian.PutUint16(c[6:], d.state.Status)
	d.config.Unlock()
	binary.LittleEndian.PutUint16(c[8:], uint16(len(d.ports)))
	binary.LittleEndian.PutUint16(c[10:], d.cfg.MTU)
	if off < uint32(len(c)) {
		copy(p, c[off:])
	}
}

// WriteConfig does nothing: all fields are read-only. The MAC address is set
// through the control queue.
func (d *Device) WriteConfig(uint32, []byte) {}

// Counters are frames and bytes since the device was made. Rx is to the guest.
type Counters struct {
	RxFrames, RxBytes, RxDropped uint64
	TxFrames, TxBytes, TxDropped uint64
	TxForeign                    uint64 // frames that were not the guest's own: see [Policy]
}

type counters struct {
	rxFrames, rxBytes, rxDropped atomic.Uint64
	txFrames, txBytes, txDropped atomic.Uint64
	txForeign                    atomic.Uint64
}

// Counters returns the counters.
func (d *Device) Counters() Counters {
	c := &d.counters
	return Counters{
		c.rxFrames.Load(), c.rxBytes.Load(), c.rxDropped.Load(),
		c.txFrames.Load(), c.txBytes.Load(), c.txDropped.Load(),
		c.txForeign.Load(),
	}
}
