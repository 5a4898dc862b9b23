package net

import (
	"errors"
	"fmt"

	"github.com/govmm/govmm/internal/strictcbor"
)

// State is what travels with a migration. Frames that wait in a tap do not, and
// are lost.
type State struct {
	MAC         MAC    `cbor:"mac"`
	Status      uint16 `cbor:"status"`       // of section 5.1.4; the link in it is always up, and nobody's
	Pairs       uint16 `cbor:"pairs"`        // queue pairs that the driver uses
	Offloads    uint64 `cbor:"offloads"`     // Guest features that the driver accepts, if OffloadsSet
	OffloadsSet bool   `cbor:"offloads_set"` // the driver has set Offloads
}

var errState = errors.New("net state")

// fresh is the state before a driver has changed it.
func (d *Device) fresh() State {
	return State{MAC: d.cfg.MAC, Status: d.withLink(0), Pairs: 1}
}

// SaveState returns a [State].
func (d *Device) SaveState() ([]byte, error) {
	d.config.Lock()
	s := d.state
	d.config.Unlock()
	s.Status |= statusLinkUp // the link is a matter of the host; v0.1.0 takes it from here
	raw, err := strictcbor.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errState, err)
	}
	return raw, nil
}

// LoadState takes a [State].
func (d *Device) LoadState(raw []byte) error {
	var s State
	if err := strictcbor.Unmarshal(raw, &s); err != nil {
		return fmt.Errorf("%w: %w", errState, err)
	}
	if d.renewed {
		s.MAC = d.cfg.MAC
	}
	switch {
	case !s.MAC.valid():
		return fmt.Errorf("%w: MAC address %s", errState, s.MAC)
	case !d.mayBe(s.MAC):
		why := "antispoof of this host forbids"
		if d.cfg.OneMAC {
			why = "a macvtap does not allow"
		}
		return fmt.Errorf("%w: the guest has changed its MAC address from %s to %s, which %s", errState, d.cfg.MAC, s.MAC, why)
	case s.Pairs < 1 || int(s.Pairs) > len(d.ports):
		return fmt.Errorf("%w: queue pairs in use must be between 1 and the %d of %s, got %d", errState, len(d.ports), d.cfg.Backend.Name(), s.Pairs)
	case s.Status&^(statusLinkUp|statusAnnounce) != 0:
		return fmt.Errorf("%w: status %#x", errState, s.Status)
	case s.Offloads&^guestOffloads != 0:
		return fmt.Errorf("%w: offloads %#x", errState, s.Offloads)
	}
	d.config.Lock()
	defer d.config.Unlock()
	d.arrived = true
	s.Status = d.withLink(s.Status)
	d.setState(s)
	return nil
}
