package vmm

import (
	"context"

	"github.com/govmm/govmm/migrate"
)

// source is a machine as [migrate.Migration] sends it.
type source struct {
	guestRAM
	*Machine
}

var _ migrate.Source = (*source)(nil)

// Source returns the machine for [migrate.New]. It is not closed before the
// migration's Run has returned.
func (m *Machine) Source() migrate.Source { return &source{guestRAM{m.mem}, m} }

// Slots is the memory's: a Machine has none.
func (s *source) Slots() []migrate.Slot { return s.guestRAM.Slots() }

// MigrationConfig is the spec.
func (s *source) MigrationConfig() ([]byte, error) { return s.spec.Encode() }

// PauseForHandoff stops the vCPUs, their last accesses completed, and the
// input of the serial port: what was typed and not read travels in its state.
// There is nothing else that writes guest memory.
func (s *source) PauseForHandoff(ctx context.Context) (wasRunning bool, err error) {
	if err := context.Cause(ctx); err != nil {
		return false, err
	}
	before, err := s.gate.hold(holdHandoff, 0)
	if err != nil {
		return false, s.explain(err)
	}
	s.stopInput()
	return before&holdUser == 0, nil
}

// ResumeAfterAbort lets the guest go on, unless it was paused before.
func (s *source) ResumeAfterAbort() error {
	s.startInput()
	return s.let(holdHandoff, 0)
}

// SaveState returns the encoded state.
func (s *source) SaveState() ([]byte, error) {
	state, err := s.Machine.SaveState()
	if err != nil {
		return nil, err
	}
	return EncodeState(state)
}

// target is a machine as [migrate.Receiver] fills it.
type target struct {
	guestRAM
	*Machine
}

var _ migrate.Target = (*target)(nil)

// Slots is the memory's: a Machine has none.
func (t *target) Slots() []migrate.Slot { return t.guestRAM.Slots() }

// LoadState decodes and loads the state.
func (t *target) LoadState(state []byte) error {
	s, err := DecodeState(state)
	if err != nil {
		return err
	}
	return t.Machine.LoadState(s)
}

// Start lets the guest run here.
func (t *target) Start(paused bool) error { return t.Machine.Start(paused) }

// Discard frees the machine.
func (t *target) Discard() error { return t.Close() }
