package vsock

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/govmm/govmm/internal/strictcbor"
)

// State is what travels with a migration. Connections do not: the destination
// sends TRANSPORT_RESET (section 5.10.6.7), and the driver ends the connections
// that are established.
type State struct {
	CID uint32 `cbor:"cid"`
	// NextPort is the port of the host's next connection. The destination goes
	// on with it, so that the guest takes no new connection for an old one.
	NextPort uint32 `cbor:"next_port"`
	// Resets are the RST packets that the guest has not got yet: refusals, and
	// one for each connection that the guest has requested and that is not
	// established, which TRANSPORT_RESET does not end.
	Resets []Reset `cbor:"resets"`
}

// Reset is an RST packet to the guest.
type Reset struct {
	CID       uint64 `cbor:"cid"` // the sender's
	HostPort  uint32 `cbor:"host_port"`
	GuestPort uint32 `cbor:"guest_port"`
	Type      uint16 `cbor:"type"`
}

func (r Reset) header() header {
	return header{SrcCID: r.CID, SrcPort: r.HostPort, DstPort: r.GuestPort, Type: r.Type, Op: opReset}
}

// SaveState implements [virtio.Device].
func (d *Device) SaveState() ([]byte, error) {
	d.serving.Lock()
	s := State{CID: d.config.GuestCID(), NextPort: d.nextPort, Resets: append([]Reset{}, d.resets...)}
	for at, c := range d.conns {
		if c.due&dueResponse != 0 || !c.established && c.host == nil {
			s.Resets = append(s.Resets, Reset{CID: hostCID, HostPort: at.host, GuestPort: at.guest, Type: typeStream})
		}
	}
	sortResets(s.Resets[len(d.resets):])
	d.serving.Unlock()
	b, err := strictcbor.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("vsock: encode the state: %w", err)
	}
	return b, nil
}

func sortResets(r []Reset) {
	slices.SortFunc(r, func(a, b Reset) int {
		return cmp.Or(cmp.Compare(a.HostPort, b.HostPort), cmp.Compare(a.GuestPort, b.GuestPort))
	})
}

// LoadState implements [virtio.Device]. It makes TRANSPORT_RESET due.
func (d *Device) LoadState(b []byte) error {
	var s State
	if err := strictcbor.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("vsock: decode the state: %w", err)
	}
	if d.config.Renewed {
		s.CID = d.config.GuestCID()
	}
	if err := s.check(d.config.GuestCID()); err != nil {
		return fmt.Errorf("vsock: state: %w", err)
	}
	d.serving.Lock()
	defer d.serving.Unlock()
	d.nextPort = s.NextPort
	d.resets = append([]Reset{}, s.Resets...)
	d.lost = true
	return nil
}

func (s *State) check(cid uint32) error {
	switch {
	case s.CID != cid:
		return fmt.Errorf("expected CID %d as configured here, found %d", cid, s.CID)
	case s.NextPort < firstPort || s.NextPort == 1<<32-1:
		return fmt.Errorf("the port of the host's next connection must be between %d and %d, got %d", firstPort, uint32(1<<32-2), s.NextPort)
	case len(s.Resets) > maxResetsSaved:
		return fmt.Errorf("resets must be at most %d, got %d", maxResetsSaved, len(s.Resets))
	}
	return nil
}

// maxResetsSaved counts refusals that wait, connections that have ended, and
// connections that are not established.
const maxResetsSaved = maxResets + 2*maxConnections
