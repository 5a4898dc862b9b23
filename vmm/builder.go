package vmm

import (
	"context"
	"errors"
	"fmt"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/vsock"
	"github.com/govmm/govmm/vmm/memory"
)

// Builder makes the machines of a migration's destination.
type Builder struct {
	// Ends are what the machine's lines are connected to.
	Ends Ends
	// Disks and Nets take the place of the source's, one for one; nil: the
	// machine has the paths and taps that it had there.
	Disks []blk.Config
	Nets  []net.Options
	// Vsock takes the place of the source's socket; nil: the path it had there.
	Vsock *vsock.Config
	// Backing is what guest memory is made of here; "": as at the source.
	Backing memory.Backing
	// Tracking is how writes are tracked when the guest moves on; "": TrackAuto.
	Tracking DirtyTracking
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
	spec.Tracking = b.Tracking
	if b.Name != "" {
		spec.Name = b.Name
	}
	logf := b.Logf
	if logf == nil {
		logf = func(string, ...any) {}
	}
	// All that does not fit is named at once.
	wrong := []error{spec.Devices.overrideDisks(b.Disks), spec.Devices.overrideNets(b.Nets), spec.Devices.overrideVsock(b.Vsock)}
	known := errors.Join(wrong...) == nil
	wrong = append(wrong, fitsHere(&spec))
	var backends *backends
	if known {
		if backends, err = openBackends(&spec.Devices, logf); err != nil {
			wrong = append(wrong, err)
		}
	}
	if err := errors.Join(wrong...); err != nil {
		return nil, errors.Join(err, backends.close())
	}
	m, err := newMachineWith(spec, b.Ends, logf, backends)
	if err != nil {
		return nil, err
	}
	return &target{guestRAM: guestRAM{m.mem}, Machine: m}, nil
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
