package transport

import (
	"context"
	"errors"
	"fmt"

	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
)

// State is everything of a device on PCI that travels with a migration: plain
// data. Eventfds do not travel; [Transport.Resume] makes up for what they may
// have counted.
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
	// Started: the device has the queue. One that the driver enabled and that
	// could not be started is not.
	Started bool `cbor:"started"`
}

// ErrNotPaused: the state of a device that runs cannot be saved.
var ErrNotPaused = errors.New("the device is not paused")

// ErrUsed: a state is loaded into a transport that has been used already.
var ErrUsed = errors.New("the device has been used")

// Pause makes the device quiet and takes its interrupts' irqfds off, so that
// all that was raised is in the interrupt controllers. The vCPUs have stopped.
// If ctx ends first, everything goes on.
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
	if err := t.msix.Suspend(); err != nil {
		return errors.Join(err, t.resume())
	}
	return nil
}

// Resume undoes Pause, or starts a device whose state was loaded: guest memory
// has landed, the interrupt controllers are loaded, the vCPUs are about to run.
// Each queue is kicked and each interrupt raised once, since what was
// under way to or from the driver may be in an eventfd on another host. If the
// device cannot go on it needs a reset, which the driver learns.
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

// LoadState puts a transport that no driver has used into the state of its
// twin. It is paused then, and [Transport.Resume] starts the device. Guest
// memory is not touched. After an error the transport is of no use.
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
	if err := t.msix.Suspend(); err != nil {
		return err
	}
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

// checkState finds what no driver can have brought about, or what this device
// cannot go on with.
func (t *Transport) checkState(s State) error {
	if s.Type != t.dev.ID() {
		return fmt.Errorf("the state is of a device of type %d", s.Type)
	}
	if len(s.Queues) != len(t.queues) {
		return fmt.Errorf("the state has %d queues, the device %d", len(s.Queues), len(t.queues))
	}
	if s.Status&^(statusDriver|statusNeedsReset) != 0 || s.ISR&^(isrQueue|isrConfig) != 0 {
		return fmt.Errorf("status %#x or ISR %#x has bits that do not exist", s.Status, s.ISR)
	}
	if s.Status&statusFeaturesOK != 0 {
		if missing := s.DriverFeatures &^ t.offered; missing != 0 {
			return fmt.Errorf("the guest uses features %#x, which the device here does not have", missing)
		}
	}
	const running = statusDriverOK | statusFeaturesOK
	if s.Active && s.Status&running != running {
		return fmt.Errorf("an active device with status %#x", s.Status)
	}
	for i, q := range s.Queues {
		if q.Started && (!q.Queue.Enabled || s.Status&running != running) {
			return fmt.Errorf("queue %d has been started and is not enabled, or with status %#x", i, s.Status)
		}
	}
	return nil
}
