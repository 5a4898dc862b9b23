package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/memory"
)

// Builder makes the machines of a migration's destination.
type Builder struct {
	// Ends are what the machine's lines are connected to.
	Ends Ends
	// Devices name what of this host takes the place of the source's: for each
	// kind either nothing, which means the same names as at the source, or one for
	// each of the guest's devices of the kind, in their order. They are made by
	// [virtio.Kind.ParseHere].
	Devices []virtio.Spec
	// Kinds are kinds of devices beside those of [Kinds].
	Kinds []virtio.Kind
	// Backing is what guest memory is made of here; "": as at the source.
	Backing memory.Backing
	// Tracking is how writes are tracked when the guest moves on; "": TrackAuto.
	Tracking DirtyTracking
	// Overcommit allows more memory than is available here, see [memory.Admit].
	Overcommit bool
	// Name is the machine's name here; "": as at the source.
	Name string
	// Log is as for [New].
	Log *slog.Logger
}

var _ migrate.Builder = (*Builder)(nil)

// Build makes a machine from what the source sent, a [*Target], after it has
// compared it with this host: the error lists everything that does not fit.
func (b *Builder) Build(ctx context.Context, config []byte) (migrate.Target, error) {
	t, err := b.BuildTarget(ctx, config)
	if err != nil {
		return nil, err // not a nil *Target
	}
	return t, nil
}

// BuildTarget is Build with the type of what it makes.
func (b *Builder) BuildTarget(_ context.Context, config []byte) (*Target, error) {
	go rehearse()
	spec, err := decodeSpec(config, b.Kinds)
	if err != nil {
		return nil, err
	}
	if b.Backing != "" {
		spec.Backing = b.Backing
	}
	spec.Tracking, spec.Overcommit, spec.received = b.Tracking, b.Overcommit, true
	if b.Name != "" {
		spec.Name = b.Name
	}
	log := b.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	moved := move(spec.Devices, b.Devices, spec.kinds())
	wrong := []error{moved, fitsHere(&spec)}
	var opened backends
	if moved == nil { // the paths and taps are known
		if opened, err = openBackends(spec.Devices, log); err != nil {
			wrong = append(wrong, err)
		}
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, errors.Join(err, opened.close())
	}
	m, err := newWith(spec, b.Ends, log, opened, nil)
	if err != nil {
		return nil, err
	}
	return &Target{guestRAM: guestRAM{m.mem}, Machine: m}, nil
}

// fitsHere compares a spec with this host.
func fitsHere(spec *Spec) error {
	sys, err := kvm.Shared()
	if err != nil {
		return err
	}
	h, err := thisHost(sys)
	if err != nil {
		return fmt.Errorf("find out what this host can do: %w", err)
	}
	return h.incompatible(spec)
}

// Target is a machine as [migrate.Receiver] fills it.
type Target struct {
	guestRAM
	*Machine
	prepared *machineState // by PrepareState
	saved    window        // when the source saved it
}

var (
	_ migrate.Target   = (*Target)(nil)
	_ migrate.Comparer = (*Target)(nil)

	_ migrate.PreviewChecker = (*Target)(nil)
)

// Slots lists the memory slots.
func (t *Target) Slots() []migrate.Slot { return t.guestRAM.Slots() }

// SavedAfter implements [migrate.Timed].
func (t *Target) SavedAfter(moment time.Time) { t.saved.after = moment }

// PrepareState decodes the state, and checks whether this machine can load it.
func (t *Target) PrepareState(state []byte) error {
	t.saved.before = time.Now()
	s, err := decodeState(state)
	if err != nil {
		return err
	}
	if err := t.fits(s); err != nil {
		return err
	}
	t.prepared = s
	return nil
}

// CompareStorage compares the disks with the source's, see [migrate.Comparer].
func (t *Target) CompareStorage(ctx context.Context, session [16]byte, samples []byte) error {
	return t.devices.backends.compare(ctx, session, samples)
}

// LoadState loads what has been prepared.
func (t *Target) LoadState(context.Context, []byte) error {
	t.prepared.Clock.saved = t.saved
	return t.Machine.loadState(t.prepared)
}

// UnloadState makes the machine anew, around the memory and the backends that there are:
// what KVM and the devices were given cannot be taken back.
func (t *Target) UnloadState(context.Context) error {
	t.Machine.Stop()
	next, err := t.Machine.remake(true)
	if err != nil {
		return err
	}
	t.Machine, t.prepared = next, nil
	return nil
}

// Start lets the guest run here.
func (t *Target) Start(_ context.Context, paused bool) error { return t.Machine.Start(paused) }

// Discard frees the machine.
func (t *Target) Discard() error { return t.Close() }
