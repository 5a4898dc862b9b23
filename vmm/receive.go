package vmm

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/serial"
)

// ReceiveConfig says how a guest is received. The guest brings the description of
// its machine along.
type ReceiveConfig struct {
	Listener   net.Listener          // where sources connect; required. The VM closes it.
	TLS        *tls.Config           // as for migrate.Receiver.RequireTLS; nil: connections are plain
	Name       string                // "": as at the source
	Backing    memory.Backing        // "": as at the source, but a guest in huge pages is refused
	Tracking   machine.DirtyTracking // "": machine.TrackAuto
	Overcommit bool                  // as in Config
	Serial     serial.Backend        // as in Config
	Console    serial.Backend        // as in Config, for a guest that has a virtio console
	// Devices are the disks, taps and sockets of this host that the guest gets. A guest
	// that needs others is refused, unless AllowSourcePaths gives it those that have the
	// same paths and names as at the source: whatever the source names, and so only for
	// a source that this host trusts. See machine.Builder.
	Devices          []virtio.Spec
	AllowSourcePaths bool
	// DiskDir is a directory to which the guest's disks are copied, each to a new file; Devices then has none. "": both
	// sides reach the disks, or Devices says to which file each is copied. The source must copy (migrate.Options).
	DiskDir string
	Kinds   []virtio.Kind // as in Config
	Log     *slog.Logger  // as in Config
	// Inherit is how the guest of another process of this host is taken over; nil: one of
	// any host comes.
	Inherit *Inheritance
	// DiskReader is for a guest that boots from its disk; nil: such a guest is refused. It is
	// closed, if it can be, when another guest has arrived.
	DiskReader machine.KernelReader
}

// NewReceiver makes a VM that waits for a guest. [VM.Run] takes migrations
// until one completes; the VM is then what [NewVM] would have made, and the
// listener goes on to tell the source that the guest is here.
func NewReceiver(cfg ReceiveConfig) (*VM, error) {
	if cfg.Name != "" {
		if err := machine.ValidName(cfg.Name); err != nil {
			return nil, err
		}
	}
	if cfg.Backing != "" {
		if _, err := memory.ParseBacking(string(cfg.Backing)); err != nil {
			return nil, err
		}
	}
	if _, err := machine.ParseDirtyTracking(string(cfg.Tracking)); err != nil {
		return nil, err
	}
	if err := machine.MakeAbsolute(cfg.Devices); err != nil {
		return nil, err
	}
	dir, err := cfg.diskDir()
	if err != nil {
		return nil, err
	}
	if cfg.Listener == nil {
		return nil, kind.Invalid("a receiver needs a listener")
	}
	if err := machine.PrepareToReceive(); err != nil {
		return nil, err
	}
	if err := prepare(cfg.Devices, cfg.Inherit != nil); err != nil {
		return nil, err
	}
	v := newVM(cfg.Name, cfg.Serial, cfg.Console, cfg.Log)
	v.listener = cfg.Listener
	from := arrivals{
		vm: v,
		builder: machine.Builder{Ends: v.ends, Devices: cfg.Devices, AllowSourcePaths: cfg.AllowSourcePaths, DiskDir: dir, Kinds: cfg.Kinds, Backing: cfg.Backing, Tracking: cfg.Tracking, Reader: cfg.DiskReader,
			Overcommit: cfg.Overcommit, Name: cfg.Name, Log: v.log},
	}
	if cfg.Inherit != nil {
		v.receiver = migrate.NewReceiver(&inheritor{from, cfg.Inherit}, nil) // the other process says what fails
	} else {
		v.receiver = migrate.NewReceiver(&from, v.log)
	}
	if cfg.TLS != nil {
		if err := v.receiver.RequireTLS(cfg.TLS); err != nil {
			return nil, kind.Invalid("%w", err)
		}
	}
	return v, nil
}

// prepare starts what devices of a guest that comes use.
func prepare(devices []virtio.Spec, inherits bool) error {
	for _, d := range devices {
		if p, ok := d.(virtio.Preparer); ok {
			if err := p.Prepare(inherits); err != nil {
				return err
			}
		}
	}
	return nil
}

// diskDir is DiskDir as an absolute path.
func (c *ReceiveConfig) diskDir() (string, error) {
	if c.DiskDir == "" {
		return "", nil
	}
	if specOf[*blk.Spec](c.Devices) != nil {
		return "", kind.Invalid("disks are copied to a directory, or are given one by one: not both")
	}
	dir, err := filepath.Abs(c.DiskDir)
	if err != nil {
		return "", err
	}
	if st, err := os.Stat(dir); err != nil {
		return "", fmt.Errorf("directory for disks: %w", err)
	} else if !st.IsDir() {
		return "", kind.Invalid("directory for disks %s: it is no directory", dir)
	}
	return dir, nil
}

// Addr returns the address that a receiver listens on, nil for other VMs.
func (v *VM) Addr() net.Addr {
	if v.listener == nil {
		return nil
	}
	return v.listener.Addr()
}

// Arrived returns a channel that is closed when the guest that a receiver waits for runs
// here; nil for other VMs.
func (v *VM) Arrived() <-chan struct{} {
	if v.receiver == nil {
		return nil
	}
	return v.here
}

// Whole returns a channel that is closed when no memory of the guest here is missing that
// follows it from another host. Until then a vCPU may wait in the kernel for pages that this
// process fetches: nothing may wait for all threads of the process.
func (v *VM) Whole() <-chan struct{} {
	if m := v.current(); m != nil {
		return m.Whole()
	}
	none := make(chan struct{})
	close(none)
	return none
}

// receive waits until a guest has arrived. The listener goes on until stop is
// called, which waits for its end. When ctx ends first there is no machine.
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
	builder machine.Builder
}

func (a *arrivals) Build(ctx context.Context, config []byte) (migrate.Target, error) {
	t, err := a.builder.BuildTarget(ctx, config)
	if err != nil {
		return nil, err
	}
	a.vm.setIncoming(t.Machine)
	return &arrival{Target: t, vm: a.vm, reader: a.builder.Reader}, nil
}

// arrival is a target whose start makes it the VM's machine: before the source
// can learn that the guest runs here.
type arrival struct {
	*machine.Target
	vm     *VM
	reader machine.KernelReader // nil: there is none
}

var (
	_ migrate.Timed          = (*arrival)(nil)
	_ migrate.PreviewChecker = (*arrival)(nil)
)

func (a *arrival) Start(ctx context.Context, paused bool) error {
	return a.start(func() error { return a.Target.Start(ctx, paused) })
}

func (a *arrival) start(run func() error) error {
	if err := a.vm.arrive(); err != nil {
		return err
	}
	defer a.vm.arrived()
	if err := run(); err != nil {
		return err
	}
	a.vm.setIncoming(nil)
	a.vm.setMachine(a.Machine)
	closeUnneeded(a.reader, a.Machine)
	close(a.vm.here) // a machine starts once
	return nil
}

// closeUnneeded closes a reader of disks, if it can be, when its host has another guest.
func closeUnneeded(reader machine.KernelReader, m *machine.Machine) {
	if c, ok := reader.(io.Closer); ok && m.Spec().Boot == nil {
		_ = c.Close()
	}
}

func (a *arrival) UnloadState(ctx context.Context) error {
	a.vm.setIncoming(nil)
	if err := a.Target.UnloadState(ctx); err != nil {
		return err
	}
	a.vm.setIncoming(a.Machine)
	return nil
}

func (a *arrival) Discard() error {
	a.vm.setIncoming(nil)
	return a.Target.Discard()
}

func (v *VM) setIncoming(m *machine.Machine) {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	v.incoming = m
}
