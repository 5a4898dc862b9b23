package platform

import (
	"encoding/binary"
	"fmt"
	"sync"
)

// PMPorts is the number of PM's ports: PM1a_EVT_BLK with status and enable, and
// PM1a_CNT_BLK, 16 bits each (ACPI 6.5, 4.8.3). Package acpi defines their address.
const PMPorts = 6

// PM1 registers and their bits (4.8.3.1, 4.8.3.2).
const (
	pmStatus, pmEnable, pmControl = 0, 2, 4 // offsets

	pmPowerButton = 1 << 8                                     // in status and enable
	pmEvents      = 1<<0 | 1<<4 | 1<<5 | pmPowerButton | 1<<10 // timer, bus master, global, RTC
	pmSCIEnable   = 1 << 0                                     // in control
	pmSleepType   = 7 << 10
	pmSleepEnable = 1 << 13
)

// PMConfig has the functions that PM calls.
type PMConfig struct {
	// SCI sets the level of ACPI's interrupt. PM holds its lock during the
	// call, so that levels arrive in order. SCI must not call PM.
	SCI func(level bool)
	// PowerOff is called when the guest turns itself off. PM holds no lock.
	PowerOff func()
}

// PM is the fixed hardware of ACPI power management: a power button that raises the
// SCI, and soft off. It is always in ACPI mode (SCI_EN is set), has no PM timer, and
// only one sleep state, independent of SLP_TYP.
type PM struct {
	cfg PMConfig

	mu    sync.Mutex // guards state and level
	state PMState
	level bool // of the SCI
}

// PMState is PM's state that a migration sends.
type PMState struct {
	Status  uint16 `cbor:"status"`
	Enable  uint16 `cbor:"enable"`
	Control uint16 `cbor:"control"`
	// Presses counts how often the power button was pressed. Taken is Presses
	// when the guest last acknowledged the button.
	Presses uint64 `cbor:"presses"`
	Taken   uint64 `cbor:"taken"`
}

// NewPM returns power management in its state after a reset.
func NewPM(cfg PMConfig) *PM { return &PM{cfg: cfg} }

// PressPowerButton asks the guest to shut down. It has no effect on a guest that
// has not enabled the button.
func (d *PM) PressPowerButton() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state.Status |= pmPowerButton
	d.state.Presses++
	d.update()
}

// ButtonEnabled returns whether the guest has enabled the power button.
func (d *PM) ButtonEnabled() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state.Enable&pmPowerButton != 0
}

// update sets the SCI's level as the registers say. The caller holds mu.
func (d *PM) update() {
	if level := d.state.Status&d.state.Enable != 0; level != d.level {
		d.level = level
		d.cfg.SCI(level)
	}
}

// Read reads registers.
func (d *PM) Read(off uint64, p []byte) {
	var r [PMPorts]byte
	d.mu.Lock()
	binary.LittleEndian.PutUint16(r[pmStatus:], d.state.Status)
	binary.LittleEndian.PutUint16(r[pmEnable:], d.state.Enable)
	binary.LittleEndian.PutUint16(r[pmControl:], d.state.Control|pmSCIEnable)
	d.mu.Unlock()
	clear(p)
	if off < PMPorts {
		copy(p, r[off:])
	}
}

// Write writes registers. A one clears a status bit.
func (d *PM) Write(off uint64, p []byte) {
	powerOff := false
	d.mu.Lock()
	for i, v := range p {
		at := off + uint64(i)
		bits := uint16(v) << (8 * (at & 1))
		mask := uint16(0xff) << (8 * (at & 1))
		switch at &^ 1 {
		case pmStatus:
			if d.state.Status&bits&pmPowerButton != 0 {
				d.state.Taken = d.state.Presses
			}
			d.state.Status &^= bits
		case pmEnable:
			d.state.Enable = d.state.Enable&^mask | bits&pmEvents
		case pmControl:
			d.state.Control = d.state.Control&^mask | bits&pmSleepType
			powerOff = powerOff || bits&pmSleepEnable != 0
		}
	}
	d.update()
	d.mu.Unlock()
	if powerOff {
		d.cfg.PowerOff()
	}
}

// SaveState returns the state.
func (d *PM) SaveState() PMState {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.state
}

// LoadState loads a saved state and sets the SCI's level accordingly. The saved
// state of the interrupt controller includes the same level.
func (d *PM) LoadState(s PMState) error {
	if s.Status&^pmEvents != 0 || s.Enable&^pmEvents != 0 || s.Control&^pmSleepType != 0 || s.Taken > s.Presses {
		return fmt.Errorf("ACPI power management state: status %#x, enable %#x or control %#x has reserved bits, or %d of %d presses are acknowledged",
			s.Status, s.Enable, s.Control, s.Taken, s.Presses)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.state = s
	d.update()
	return nil
}
