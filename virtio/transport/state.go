package transport

import (
	"context"
	"errors"
	"fmt"

	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
)

// State is everything of a device on PCI that travels with a migration. Eventfds
// do not travel: [Transport.Resume] kicks each queue instead.
type State struct {
	Type           uint16            `cbor:"type"` // the device's
	Function       pci.FunctionState `cbor:"function"`
	Status         uint8             `cbor:"status"`
	Generation     uint8             `cbor:"generation"`
	ISR            uint8             `cbor:"isr"`
	Active         bool              `cbor:"active"` // the device had been activated
	ConfigVector   uint16            `cbor:"config_vector"`
	QueueSelect    uint16            `cbor:"queue_select"`
	DeviceSelect   uint32            `cbor:"device_select"`
	DriverSelect   uint32            `cbor:"driver_select"`
	DriverFeatures uint64            `cbor:"driver_features"`
	Queues         []QueueState      `cbor:"queues"`
	Device         []byte            `cbor:"device"` // of the device type
}

// QueueState is a queue with its interrupt.
type QueueState struct {
	Queue  virtio.QueueState `cbor:"queue"`
	Vector uint16            `cbor:"vector"`
	// Started: the queue has been started. One that the driver enabled with
	// invalid values has not.
	Started bool `cbor:"started"`
}

// ErrNotPaused: the state of a device that runs cannot be saved.
var ErrNotPaused = errors.New("the device is not paused")

// ErrUsed: a state can be loaded only into a transport that no driver has used.
var ErrUsed = errors.New("the device has been used")

// Pause pauses the device and holds its interrupts back; those that were raised are in
// the interrupt controllers. The vCPUs have stopped. If ctx ends first, the device goes
// on.
func (t *Transport) Pause(ctx context.Context) error {
	t.regs.Lock()
	defer t.regs.Unlock()
	if t.paused {
		return nil
	}
	if t.active && !t.loaded {
		if err := t.dev.Pause(ctx); err != nil {
			return fmt.Errorf("pause virtio device of type %d: %w", t.dev.ID(), err)
		}
	}
	t.paused = true
	t.msix.Suspend()
	return nil
}

// Resume undoes Pause, or activates a device whose state was loaded, when guest
// memory and the interrupt controllers are loaded and the vCPUs have not started.
// It kicks each queue and raises each interrupt once, because an eventfd of
// another host may have held a notification. If the device cannot go on,
// DEVICE_NEEDS_RESET is set.
func (t *Transport) Resume() error {
	t.regs.Lock()
	defer t.regs.Unlock()
	return t.resume()
}

func (t *Transport) resume() error {
	if !t.paused {
		return nil
	}
	var err error
	switch {
	case t.loaded:
		t.loaded = false
		err = t.dev.Activate(t.driverFeatures, t.deviceQueues(), t)
		t.active = err == nil
	case t.active:
		err = t.dev.Resume()
	}
	t.paused = false
	t.msix.Resume()
	if err != nil {
		err = fmt.Errorf("resume virtio device of type %d: %w", t.dev.ID(), err)
		t.NeedsReset(err)
	}
	for _, q := range t.queues {
		if q.started {
			q.Signal()
			t.queueInterrupt(q)
		}
	}
	if t.status.Load()&statusDriverOK != 0 {
		t.configInterrupt()
	}
	return err
}

// SaveState returns the state. It fails with [ErrNotPaused] before Pause.
func (t *Transport) SaveState() (State, error) {
	t.regs.Lock()
	defer t.regs.Unlock()
	if !t.paused {
		return State{}, fmt.Errorf("save virtio device of type %d: %w", t.dev.ID(), ErrNotPaused)
	}
	s := State{
		Type: t.dev.ID(), Function: t.function.SaveState(),
		Status: uint8(t.status.Load()), Generation: uint8(t.generation.Load()), ISR: uint8(t.isr.Load()), Active: t.active,
		ConfigVector: uint16(t.configVector.Load()), QueueSelect: t.queueSelect,
		DeviceSelect: t.deviceSelect, DriverSelect: t.driverSelect, DriverFeatures: t.driverFeatures,
	}
	for i, q := range t.queues {
		regs := q.regs
		if q.started {
			var err error
			if regs, err = q.Queue.SaveState(); err != nil {
				return State{}, fmt.Errorf("save virtio device of type %d: queue %d: %w", t.dev.ID(), i, err)
			}
		}
		s.Queues = append(s.Queues, QueueState{regs, uint16(q.vector.Load()), q.started})
	}
	var err error
	if s.Device, err = t.dev.SaveState(); err != nil {
		return State{}, fmt.Errorf("save virtio device of type %d: %w", t.dev.ID(), err)
	}
	return s, nil
}

// LoadState loads a state into a transport that no driver has used. The transport
// is then paused, and [Transport.Resume] starts the device. LoadState does not
// touch guest memory. After an error the transport cannot be used.
func (t *Transport) LoadState(s State) error {
	t.regs.Lock()
	defer t.regs.Unlock()
	if err := t.load(s); err != nil {
		return fmt.Errorf("load virtio device of type %d: %w", t.dev.ID(), err)
	}
	return nil
}

func (t *Transport) load(s State) error {
	if t.status.Load() != 0 || t.active || t.paused {
		return ErrUsed
	}
	if err := t.checkState(s); err != nil {
		return err
	}
	t.paused = true
	t.msix.Suspend()
	if err := t.function.LoadState(s.Function); err != nil {
		return err
	}
	t.status.Store(uint32(s.Status))
	t.generation.Store(uint32(s.Generation))
	t.isr.Store(uint32(s.ISR))
	t.configVector.Store(t.vector(s.ConfigVector))
	t.queueSelect, t.deviceSelect, t.driverSelect = s.QueueSelect, s.DeviceSelect, s.DriverSelect
	t.driverFeatures = s.DriverFeatures
	for i, q := range t.queues {
		q.regs = s.Queues[i].Queue
		q.vector.Store(t.vector(s.Queues[i].Vector))
		if s.Queues[i].Started {
			if err := t.start(i); err != nil {
				return err
			}
		}
	}
	if err := t.dev.LoadState(s.Device); err != nil {
		return err
	}
	t.active, t.loaded = s.Active, s.Active
	return nil
}

// checkState refuses a state that no driver can reach, or that this device cannot
// go on from.
func (t *Transport) checkState(s State) error {
	if s.Type != t.dev.ID() {
		return fmt.Errorf("expected a state of device type %d, found type %d", t.dev.ID(), s.Type)
	}
	if len(s.Queues) != len(t.queues) {
		return fmt.Errorf("expected %d queues, found %d", len(t.queues), len(s.Queues))
	}
	if s.Status&^(statusDriver|statusNeedsReset) != 0 || s.ISR&^(isrQueue|isrConfig) != 0 {
		return fmt.Errorf("status %#x or ISR %#x has undefined bits", s.Status, s.ISR)
	}
	if s.Status&statusFeaturesOK != 0 {
		if missing := s.DriverFeatures &^ t.offered; missing != 0 {
			return fmt.Errorf("the guest uses features %#x, which the device of this host does not have", missing)
		}
	}
	const running = statusDriverOK | statusFeaturesOK
	if s.Active && s.Status&running != running {
		return fmt.Errorf("an active device with status %#x", s.Status)
	}
	for i, q := range s.Queues {
		if q.Started && (!q.Queue.Enabled || s.Status&running != running) {
			return fmt.Errorf("queue %d is started but not enabled, or has status %#x", i, s.Status)
		}
	}
	return nil
}
