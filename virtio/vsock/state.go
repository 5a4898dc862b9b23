package vsock

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/govmm/govmm/internal/strictcbor"
)

// State is what of the device travels with a migration. Connections do not:
// the guest is told so at the destination (TRANSPORT_RESET, section 5.10.6.7),
// and its driver ends those that are established.
type State struct {
	CID uint32 `cbor:"cid"`
	// NextPort is that of the host's next connection. It goes on at the
	// destination, so that no connection there is taken for an old one of the
	// guest's.
	NextPort uint32 `cbor:"next_port"`
	// Resets are what the guest is still to be told: refusals, and the end of
	// connections that it has asked for and was not answered about, which a
	// driver does not count among those that TRANSPORT_RESET ends.
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
		return nil, fmt.Errorf("vsock: encode its state: %w", err)
	}
	return b, nil
}

func sortResets(r []Reset) {
	slices.SortFunc(r, func(a, b Reset) int {
		return cmp.Or(cmp.Compare(a.HostPort, b.HostPort), cmp.Compare(a.GuestPort, b.GuestPort))
	})
}

// LoadState implements [virtio.Device]. The guest will be told that its
// connections are gone.
func (d *Device) LoadState(b []byte) error {
	var s State
	if err := strictcbor.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("vsock: decode its state: %w", err)
	}
	if err := s.check(d.config.GuestCID()); err != nil {
		return fmt.Errorf("vsock: its state: %w", err)
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
		return fmt.Errorf("the guest knows itself by CID %d, here it would be %d", s.CID, cid)
	case s.NextPort < firstPort || s.NextPort == 1<<32-1:
		return fmt.Errorf("port %d for the host's next connection", s.NextPort)
	case len(s.Resets) > maxResetsSaved:
		return fmt.Errorf("%d refusals, %d are possible", len(s.Resets), maxResetsSaved)
	}
	return nil
}

// maxResetsSaved: those that wait, those that connections ended with, and those
// of connections that were not made.
const maxResetsSaved = maxResets + 2*maxConnections
