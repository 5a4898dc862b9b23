package platform

import (
	"fmt"
	"sync"
)

// GPEPorts is the number of the GPE block's ports: status and enable, 8 bits each
// (ACPI 6.5, 4.8.4.1). Package acpi defines their address.
const GPEPorts = 2

// GPEGeneration is the event by which the guest learns that it is a copy: the VM
// generation ID has changed. It is bit 0, for which the DSDT has a method.
const GPEGeneration = 1 << 0

// GPE is a block of general-purpose events, which raise the SCI.
type GPE struct {
	sci func(level bool)

	mu    sync.Mutex // guards state and level
	state GPEState
	level bool // of the SCI, as far as these events go
}

// GPEState is GPE's state that a migration sends.
type GPEState struct {
	Status uint8 `cbor:"status,omitzero"`
	Enable uint8 `cbor:"enable,omitzero"`
}

// NewGPE returns a block in its state after a reset. sci sets the level of ACPI's
// interrupt; GPE holds its lock during the call, so that levels arrive in order. It must
// not call GPE.
func NewGPE(sci func(level bool)) *GPE { return &GPE{sci: sci} }

// Raise makes events happen.
func (d *GPE) Raise(events uint8) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state.Status |= events
	d.update()
}

// InUse says whether the guest has enabled an event, or one has happened.
func (d *GPE) InUse() bool { return d.SaveState() != GPEState{} }

// update sets the SCI's level as the registers say. The caller holds mu.
func (d *GPE) update() {
	if level := d.state.Status&d.state.Enable != 0; level != d.level {
		d.level = level
		d.sci(level)
	}
}

// Read reads registers.
func (d *GPE) Read(off uint64, p []byte) {
	s := d.SaveState()
	clear(p)
	if off < GPEPorts {
		copy(p, []byte{s.Status, s.Enable}[off:])
	}
}

// Write writes registers. A one clears a status bit.
func (d *GPE) Write(off uint64, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, v := range p {
		switch off + uint64(i) {
		case 0:
			d.state.Status &^= v
		case 1:
			d.state.Enable = v & GPEGeneration
		}
	}
	d.update()
}

// SaveState returns the state.
func (d *GPE) SaveState() GPEState {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

// LoadState loads a saved state and sets the SCI's level accordingly.
func (d *GPE) LoadState(s GPEState) error {
	if (s.Status|s.Enable)&^GPEGeneration != 0 {
		return fmt.Errorf("general-purpose events: status %#x or enable %#x has reserved bits", s.Status, s.Enable)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state = s
	d.update()
	return nil
}
