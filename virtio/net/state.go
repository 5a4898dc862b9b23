package net

import (
	"errors"
	"fmt"

	"github.com/govmm/govmm/internal/strictcbor"
)

// State is what travels with a migration. Frames do not: what waits in a tap
// is lost, as on any wire.
type State struct {
	MAC         MAC    `cbor:"mac"`
	Status      uint16 `cbor:"status"`       // of section 5.1.4
	Pairs       uint16 `cbor:"pairs"`        // queue pairs that the driver uses
	Offloads    uint64 `cbor:"offloads"`     // features that the driver takes for now, if OffloadsSet
	OffloadsSet bool   `cbor:"offloads_set"` // the driver has chosen
}

var errState = errors.New("net state")

// fresh is the state that a driver finds.
func (d *Device) fresh() State {
	s := State{MAC: d.cfg.MAC, Status: statusLinkUp, Pairs: 1}
	if d.gone.Load() {
		s.Status = 0
	}
	return s
}

// SaveState returns a [State].
func (d *Device) SaveState() ([]byte, error) {
	d.config.Lock()
	s := d.state
	d.config.Unlock()
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
	switch {
	case !s.MAC.valid():
		return fmt.Errorf("%w: MAC address %s", errState, s.MAC)
	case s.Pairs < 1 || int(s.Pairs) > len(d.ports):
		return fmt.Errorf("%w: %d queue pairs in use, %s has %d", errState, s.Pairs, d.cfg.Backend.Name(), len(d.ports))
	case s.Status&^(statusLinkUp|statusAnnounce) != 0:
		return fmt.Errorf("%w: status %#x", errState, s.Status)
	case s.Offloads&^guestOffloads != 0:
		return fmt.Errorf("%w: offloads %#x", errState, s.Offloads)
	}
	d.config.Lock()
	defer d.config.Unlock()
	d.setState(s)
	return nil
}
