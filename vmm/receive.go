package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	stdnet "net"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/vsock"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/serial"
)

// ReceiveConfig says how a guest is received. What machine it is, the guest
// brings along.
type ReceiveConfig struct {
	Name     string         // "": as at the source
	Listen   string         // host:port; port 0: any free one, see VM.Addr
	Backing  memory.Backing // "": as at the source
	Tracking DirtyTracking  // "": TrackAuto
	Serial   serial.Backend // as in Config
	Console  serial.Backend // as in Config, for a guest that has a virtio console
	// Disks, Nets and Vsock take the place of the source's, one for one; nil:
	// the same paths and taps as there. See [Builder].
	Disks []blk.Config
	Nets  []net.Options
	Vsock *vsock.Config
	Logf  func(format string, args ...any)
}

// NewReceiver makes a VM that listens for a guest. [VM.Run] takes migrations
// until one completes; the VM is then what [NewVM] would have made, and the
// listener goes on to tell the source that the guest is here.
func NewReceiver(cfg ReceiveConfig) (*VM, error) {
	if cfg.Name != "" {
		if err := validName(cfg.Name); err != nil {
			return nil, err
		}
	}
	if cfg.Backing != "" {
		if _, err := memory.ParseBacking(string(cfg.Backing)); err != nil {
			return nil, err
		}
	}
	if _, err := ParseDirtyTracking(string(cfg.Tracking)); err != nil {
		return nil, err
	}
	ln, err := stdnet.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen on %s for a migration: %w", cfg.Listen, err)
	}
	v := newVM(cfg.Name, cfg.Serial, cfg.Console, cfg.Logf)
	v.listener = ln
	v.receiver = migrate.NewReceiver(&arrivals{
		vm:      v,
		builder: Builder{Ends: v.ends, Disks: cfg.Disks, Nets: cfg.Nets, Vsock: cfg.Vsock, Backing: cfg.Backing, Tracking: cfg.Tracking, Name: cfg.Name, Logf: v.logf},
	}, slog.New(lineHandler{logf: v.logf}))
	return v, nil
}

// Addr returns the address that a receiver listens on, nil for other VMs.
func (v *VM) Addr() stdnet.Addr {
	if v.listener == nil {
		return nil
	}
	return v.listener.Addr()
}

// receive waits until a guest has arrived. The listener goes on until stop is
// called, which waits for it. When ctx ends first there is no machine.
func (v *VM) receive(ctx context.Context) (stop func(), err error) {
	serving, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- v.receiver.Serve(serving, v.listener) }()
	stop = func() {
		cancel()
		<-served
	}
	select {
	case <-v.receiver.Arrived():
		return stop, nil
	case err := <-served:
		served <- nil
		if err == nil {
			err = errors.New("the listener has ended")
		}
		return stop, err
	case <-ctx.Done():
		// A guest may arrive to the very end.
		stop()
		served <- nil
		return stop, nil
	}
}

// arrivals tells the VM about the machines that the builder makes.
type arrivals struct {
	vm      *VM
	builder Builder
}

func (a *arrivals) Build(ctx context.Context, config []byte) (migrate.Target, error) {
	t, err := a.builder.build(config)
	if err != nil {
		return nil, err
	}
	a.vm.setIncoming(t.Machine)
	return &arrival{target: t, vm: a.vm}, nil
}

// arrival is a target whose start makes it the VM's machine: before the source
// can learn that the guest runs here.
type arrival struct {
	*target
	vm *VM
}

func (a *arrival) Start(ctx context.Context, paused bool) error {
	if err := a.vm.arrive(); err != nil {
		return err
	}
	defer a.vm.arrived()
	if err := a.target.Start(ctx, paused); err != nil {
		return err
	}
	a.vm.setIncoming(nil)
	a.vm.setMachine(a.Machine)
	return nil
}

func (a *arrival) Discard() error {
	a.vm.setIncoming(nil)
	return a.target.Discard()
}

func (v *VM) setIncoming(m *Machine) {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	v.incoming = m
}
