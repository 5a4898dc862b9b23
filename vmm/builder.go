package vmm

import (
	"context"
	"fmt"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/memory"
)

// Builder makes the machines of a migration's destination.
type Builder struct {
	// Console is what the machine's serial port is connected to; nil: nothing.
	Console Console
	// Backing is what guest memory is made of here; "": as at the source.
	Backing memory.Backing
	// Name is the machine's name here; "": as at the source.
	Name string
	Logf func(format string, args ...any) // as for NewMachine
}

var _ migrate.Builder = (*Builder)(nil)

// Build makes a machine from what the source sent, after it has compared it
// with this host: the error lists everything that does not fit.
func (b *Builder) Build(_ context.Context, config []byte) (migrate.Target, error) {
	t, err := b.build(config)
	if err != nil {
		return nil, err // not a nil *target
	}
	return t, nil
}

func (b *Builder) build(config []byte) (*target, error) {
	spec, err := DecodeSpec(config)
	if err != nil {
		return nil, err
	}
	if b.Backing != "" {
		spec.Backing = b.Backing
	}
	if b.Name != "" {
		spec.Name = b.Name
	}
	if err := fitsHere(&spec); err != nil {
		return nil, err
	}
	m, err := NewMachine(spec, b.Console, b.Logf)
	if err != nil {
		return nil, err
	}
	return &target{guestRAM{m.mem}, m}, nil
}

// fitsHere compares a spec with this host.
func fitsHere(spec *Spec) (err error) {
	sys, err := kvm.Open()
	if err != nil {
		return err
	}
	defer func() {
		if cerr := sys.Close(); err == nil {
			err = cerr
		}
	}()
	h, err := thisHost(sys)
	if err != nil {
		return fmt.Errorf("find out what this host can do: %w", err)
	}
	return h.incompatible(spec)
}
