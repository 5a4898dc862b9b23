package vmm

import (
	"context"
	"errors"
	"fmt"

	"github.com/govmm/govmm/migrate"
)

// source is a machine as [migrate.Migration] sends it.
type source struct {
	guestRAM
	*Machine
}

var (
	_ migrate.Source  = (*source)(nil)
	_ migrate.Hinting = (*source)(nil)
)

// Source returns the machine for [migrate.New]. It is not closed before the
// migration's Run has returned.
func (m *Machine) Source() migrate.Source { return &source{guestRAM{m.mem}, m} }

// Slots is the memory's: a Machine has none.
func (s *source) Slots() []migrate.Slot { return s.guestRAM.Slots() }

// HintSource is the balloon, see [migrate.Hinting].
func (s *source) HintSource() migrate.HintSource {
	if s.balloon == nil {
		return nil // not a nil *balloon.Balloon
	}
	return s.balloon
}

// MigrationConfig is the spec.
func (s *source) MigrationConfig() ([]byte, error) { return s.spec.Encode() }

// PauseForHandoff stops the vCPUs, their last accesses completed, the devices,
// their requests done, and the input of serial port and console: what was typed
// and not read travels in their state. There is nothing else that writes guest
// memory. What was written to disks is made durable before, while the guest
// runs, and the little that follows by YieldForHandoff.
func (s *source) PauseForHandoff(ctx context.Context) (wasRunning bool, err error) {
	if err := context.Cause(ctx); err != nil {
		return false, err
	}
	s.backends.sync()
	before, err := s.hold(ctx, holdHandoff, 0)
	if err != nil {
		return false, err
	}
	s.stopInput()
	return before&holdUser == 0, nil
}

// YieldForHandoff flushes and unlocks the disks.
func (s *source) YieldForHandoff(context.Context) error { return s.backends.release() }

// ResumeAfterAbort locks the disks again and lets the guest go on, unless it
// was paused before. A guest whose disk somebody has taken meanwhile is left
// paused, for the user to resume when that has been settled.
func (s *source) ResumeAfterAbort(ctx context.Context) error {
	if err := s.backends.acquire(); err != nil {
		_, perr := s.hold(ctx, holdUser, 0)
		return errors.Join(fmt.Errorf("the guest stays paused here: %w", err), perr, s.let(holdHandoff, 0))
	}
	s.startInput()
	return s.let(holdHandoff, 0)
}

// SaveState returns the encoded state.
func (s *source) SaveState(context.Context) ([]byte, error) {
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
	prepared *MachineState // by PrepareState
}

var _ migrate.Target = (*target)(nil)

// Slots is the memory's: a Machine has none.
func (t *target) Slots() []migrate.Slot { return t.guestRAM.Slots() }

// PrepareState decodes the state, and looks whether it can be this machine's.
func (t *target) PrepareState(state []byte) error {
	s, err := DecodeState(state)
	if err != nil {
		return err
	}
	if err := t.fits(s); err != nil {
		return err
	}
	t.prepared = s
	return nil
}

// LoadState loads what has been prepared.
func (t *target) LoadState(context.Context, []byte) error { return t.Machine.LoadState(t.prepared) }

// Start lets the guest run here.
func (t *target) Start(_ context.Context, paused bool) error { return t.Machine.Start(paused) }

// Discard frees the machine.
func (t *target) Discard() error { return t.Close() }
