package machine

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
)

// source is a machine as [migrate.Migration] sends it.
type source struct {
	guestRAM
	*Machine
}

var (
	_ migrate.Source    = (*source)(nil)
	_ migrate.Hinting   = (*source)(nil)
	_ migrate.Sampler   = (*source)(nil)
	_ migrate.Previewer = (*source)(nil)

	_ migrate.DiskSource = (*source)(nil)
)

// Source is a machine as it is sent.
type Source = source

// Source returns the machine for [migrate.New]. It is not closed before the
// migration's Run has returned.
func (m *Machine) Source() *Source { return &source{guestRAM{m.mem}, m} }

// ResetRequested is that of [migrate.Resetter]. Its Reset makes another machine, see
// [Machine.Reset].
func (s *source) ResetRequested() <-chan struct{} { return s.ending.reset }

// Slots lists the memory slots.
func (s *source) Slots() []migrate.Slot { return s.guestRAM.Slots() }

// HintSource is the balloon, see [migrate.Hinting].
func (s *source) HintSource() migrate.HintSource {
	b, ok := deviceOf[*balloon.Balloon](s.Machine)
	if !ok {
		return nil // not a nil *balloon.Balloon
	}
	return b
}

// MigrationConfig is the spec, with the features that are in use, and with the kernel
// unpacked: the destination does not unpack what a peer sends.
func (s *source) MigrationConfig() ([]byte, error) {
	for _, d := range s.spec.Devices {
		if d, ok := d.(virtio.Stayer); ok {
			if err := d.Stays(); err != nil {
				return nil, err
			}
		}
	}
	go rehearse()
	spec := s.spec
	kernel, err := spec.kernel()
	if err != nil {
		return nil, err
	}
	if len(kernel) <= MaxKernel {
		spec.Kernel = kernel
	}
	if s.board.gpe.InUse() {
		spec.Features = append(slices.Clone(spec.Features), featureGPE)
	}
	var made []virtio.Device
	spec.Devices = slices.Clone(spec.Devices)
	for i, d := range s.devices.plugged {
		made = append(made, d.Device())
		if n, ok := spec.Devices[i].(virtio.Negotiated); ok {
			spec.Devices[i] = n.Negotiated(d.Device(), d.Negotiated())
		}
	}
	var config []byte
	err = mempage.Guard(func() error { // the kernel may be mapped from a snapshot's file
		config, err = spec.encode(made)
		return err
	})
	return config, err
}

// PrepareStop makes durable what was written to disks; YieldForHandoff does it for the
// little that follows. Storage that does not answer is left alone when ctx ends.
func (s *source) PrepareStop(ctx context.Context) error { return s.devices.backends.sync(ctx) }

// PauseForHandoff stops the vCPUs, with their last accesses completed, the devices,
// with their requests done, and the input of serial port and console: what was
// typed and not read travels in their state. Nothing else writes guest memory.
func (s *source) PauseForHandoff(ctx context.Context) (wasRunning bool, err error) {
	if err := context.Cause(ctx); err != nil {
		return false, err
	}
	s.lines.uart.HoldLine(true) // what follows of a line travels with it
	before, err := s.hold(ctx, holdHandoff, 0)
	if err != nil {
		s.lines.uart.HoldLine(false)
		if ended := (*EndedError)(nil); errors.As(err, &ended) && ended.Exit.Kind == ExitReset {
			return true, s.quiesce(ctx)
		}
		return false, err
	}
	s.stopInput()
	return before&holdUser == 0, nil
}

// SampleStorage describes the disks, see [migrate.Sampler].
func (s *source) SampleStorage(ctx context.Context, session [16]byte) ([]byte, error) {
	return s.devices.backends.sample(ctx, session)
}

// quiesce stops what is left of a machine whose guest is to be reset: its vCPUs leave
// KVM_RUN, and devices complete their requests.
func (s *source) quiesce(ctx context.Context) error {
	select {
	case <-s.ending.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	s.devices.quietMu.Lock()
	defer s.devices.quietMu.Unlock()
	return s.devices.pause(ctx)
}

// YieldForHandoff flushes and unlocks the disks, and yields the taps. A guest that is
// taken back afterwards is announced, like one that arrives.
func (s *source) YieldForHandoff(ctx context.Context) error {
	s.devices.quietMu.Lock()
	s.devices.arrived = true
	s.devices.quietMu.Unlock()
	return s.devices.backends.unlock(ctx)
}

// ResumeAfterAbort locks the disks again and lets the guest go on, unless it was
// paused before. A guest whose disk another process has taken meanwhile stays
// paused, until the user resumes it.
func (s *source) ResumeAfterAbort(ctx context.Context) error {
	if s.gate.check(0) != nil { // it has ended: the next machine locks the disks, if there is one
		return nil
	}
	if err := s.Acquire(); err != nil {
		_, perr := s.hold(ctx, holdUser, 0)
		return errors.Join(fmt.Errorf("the guest stays paused here: %w", err), perr, s.let(holdHandoff, 0))
	}
	s.startInput()
	return s.let(holdHandoff, 0)
}

// SaveState returns the encoded state.
func (s *source) SaveState(context.Context) ([]byte, error) {
	state, err := s.Machine.saveState()
	if err != nil {
		return nil, err
	}
	return encodeState(state)
}

// TakeBack lets the guest go on after a migration that ended without a verdict
// (migrate.ErrHandoffUnknown), which left it stopped and its writes logged. If the
// destination runs the guest too, it then runs twice.
func (m *Machine) TakeBack() error {
	if m.resets() {
		return nil
	}
	s := m.Source()
	if err := s.StopDirtyLog(); err != nil {
		return err
	}
	return s.ResumeAfterAbort(context.Background())
}
