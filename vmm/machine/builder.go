package machine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/memory"
)

// Builder makes the machines of a migration's destination.
type Builder struct {
	// Ends are what the machine's lines are connected to.
	Ends Ends
	// Devices are all of this host that the guest's devices get: for each kind one
	// for each of the guest's, in their order. They are made by
	// [virtio.Kind.ParseHere]. A guest that needs others is refused before anything
	// is opened for it.
	Devices []virtio.Spec
	// AllowSourcePaths gives the guest's devices what has the same names here as at
	// the source, where Devices has none of a kind: whatever paths and interfaces
	// the source names. It is for hosts that trust each other.
	AllowSourcePaths bool
	// DiskDir, an absolute path, is where disks of the guest are copied to, each to a new
	// file; Devices then has no disks. "": Devices says where disks are.
	DiskDir string
	// NewIdentity gives the devices of a guest that is a copy other addresses than those of
	// its original: those in Devices, or random ones.
	NewIdentity bool
	// Kinds are kinds of devices beside those of [Kinds].
	Kinds []virtio.Kind
	// Backing is what guest memory is made of here; "": as at the source, but a pool of
	// huge pages is this host's to give, and such a guest is refused.
	Backing memory.Backing
	// Tracking is how writes are tracked when the guest moves on; "": TrackAuto.
	Tracking DirtyTracking
	// Overcommit allows more memory than is available here, see [memory.Admit].
	Overcommit bool
	// Reader reads the kernel of a guest that boots from its disk; nil: such a guest is
	// refused.
	Reader KernelReader
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
	return b.build(config, nil)
}

// build makes the machine, from what a process of this host has left if h is not nil.
func (b *Builder) build(config []byte, h *Heirloom) (*Target, error) {
	go rehearse()
	spec, err := decodeSpec(config, b.Kinds)
	if err != nil {
		return nil, kind.Told(err)
	}
	return b.buildOf(spec, h, h.memory)
}

// buildOf is build for a spec that was decoded, with the memory that mem returns.
func (b *Builder) buildOf(spec Spec, h *Heirloom, mem func(*Spec) (*memory.Memory, error)) (*Target, error) {
	spec.Tracking, spec.Overcommit, spec.received = b.Tracking, b.Overcommit, true
	if spec.Reader = b.Reader; spec.Boot != nil && spec.Reader == nil {
		return nil, kind.Told(errors.New("the guest boots from its disk, and this host was not given one for it"))
	}
	spec.inherited = h != nil && h.Memory != nil
	if b.Name != "" {
		spec.Name = b.Name
	}
	log := b.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if b.NewIdentity {
		renew(spec.Devices, b.Devices)
	}
	names, moved := b.adopt(&spec, h != nil)
	open, err := h.open(spec.Devices)
	moved = errors.Join(moved, err)
	wrong := []error{moved, fitsHere(&spec)}
	var opened backends
	if moved == nil { // what is opened is this host's
		opened, err = openBackends(spec.Devices, log, open, func(i int, err error) error {
			return kind.Hidden(err, "%s: this host cannot open what it needs", names[i])
		})
		wrong = append(wrong, err)
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, errors.Join(err, opened.close(new(step)))
	}
	ram, err := mem(&spec)
	if err != nil {
		return nil, errors.Join(err, opened.close(new(step)))
	}
	m, err := newChecked(spec, b.Ends, log, opened, ram)
	if err != nil {
		return nil, err
	}
	return &Target{guestRAM: guestRAM{m.mem}, Machine: m}, nil
}

// adopt puts what this host gives in the place of what a spec says of its host, and
// returns the names that the devices had there. After an error nothing may be opened.
// same says that the source is a process of this host.
func (b *Builder) adopt(spec *Spec, same bool) (names []string, err error) {
	for _, d := range spec.Devices {
		names = append(names, peersName(d))
	}
	if b.Backing != "" {
		spec.Backing = b.Backing
	} else if spec.Backing == memory.Hugetlb && !b.AllowSourcePaths && !same {
		err = kind.Told(errors.New("the guest's memory is made of huge pages, and this host does not give its pool to every guest: --memory-backing hugetlb, or another"))
	}
	here := b.Devices
	if b.DiskDir != "" {
		disks, derr := disksIn(b.DiskDir, spec.Devices)
		here, err = append(slices.Clone(here), disks...), errors.Join(err, derr)
	}
	return names, errors.Join(err, move(spec.Devices, here, spec.kinds(), b.AllowSourcePaths))
}

// fitsHere compares a spec with this host.
func fitsHere(spec *Spec) error {
	sys, err := kvm.Shared()
	if err != nil {
		return err
	}
	h, err := thisHost(sys, !spec.saved)
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

	_ migrate.DiskTarget = (*Target)(nil)

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
		return kind.Told(err)
	}
	if err := t.fits(s); err != nil {
		return kind.Told(err)
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
