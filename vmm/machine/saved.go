package machine

import (
	"context"
	"fmt"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/vmm/memory"
)

// Description is what [Source.MigrationConfig] has returned, taken apart: for one who
// keeps it and makes no machine from it.
type Description struct {
	Spec           []byte // encoded, without what follows
	Kernel, Initrd []byte
	Name           string
	CPUs           int
	Memory         uint64 // bytes
	// Disks are the disks, in their order.
	Disks []blk.Spec
}

// Describe takes a description apart. Nobody has checked it.
func Describe(config []byte) (d Description, err error) {
	fail := func(err error) (Description, error) {
		return Description{}, fmt.Errorf("decode the machine's description: %w", err)
	}
	var w specWire
	if err := strictcbor.Unmarshal(config, &w); err != nil {
		return fail(err)
	}
	if w.Memory < memory.MinSize || w.Memory > memory.MaxSize {
		return fail(fmt.Errorf("memory of %d bytes: must be between %d and %d", w.Memory, memory.MinSize, uint64(memory.MaxSize)))
	}
	d.Kernel, d.Initrd = w.Kernel, w.Initrd
	d.Name, d.CPUs, d.Memory = w.Name, w.CPUs, w.Memory
	for _, dev := range w.Devices {
		if dev.Kind != blk.Kind.Name {
			continue
		}
		var s blk.Spec
		if err := strictcbor.Unmarshal(dev.Spec, &s); err != nil {
			return fail(err)
		}
		d.Disks = append(d.Disks, s)
	}
	w.Kernel, w.Initrd = nil, nil
	d.Spec, err = strictcbor.Marshal(w)
	return d, err
}

// Saved is a guest that was saved: what [Describe] and a [migrate.Target] were given.
type Saved struct {
	Spec, Kernel, Initrd []byte
	State                []byte
	// Session and Storage are those of [migrate.Comparer]; Storage nil: the disks are not compared.
	Session [16]byte
	Storage []byte
	// Memory makes the guest's memory, of so many bytes, with its content.
	Memory func(size uint64, b memory.Backing) (*memory.Memory, error)
}

// Restore makes the machine of a guest that was saved, as Build does for one that is sent,
// and loads its state. The machine has not been started.
func (b *Builder) Restore(ctx context.Context, s Saved) (*Machine, error) {
	spec, err := decodeSpecWith(s.Spec, b.Kinds, func(spec *Spec) error {
		spec.Kernel, spec.Initrd, spec.saved = s.Kernel, s.Initrd, true
		return nil
	})
	if err != nil {
		return nil, err
	}
	t, err := b.buildOf(spec, nil, func(spec *Spec) (*memory.Memory, error) { return s.Memory(spec.Memory, spec.Backing) })
	if err != nil {
		return nil, err
	}
	if err = t.PrepareState(s.State); err == nil && s.Storage != nil {
		err = t.CompareStorage(ctx, s.Session, s.Storage)
	}
	if err == nil {
		t.prepared.Clock.kept = true
		err = t.LoadState(ctx, nil)
	}
	if err == nil && t.prepared.Reset == nil {
		err = t.renewGeneration()
	}
	if err != nil {
		_ = t.Discard()
		return nil, err
	}
	return t.Machine, nil
}
