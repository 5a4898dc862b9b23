package vmm

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/serial"
	"github.com/govmm/govmm/vmm/snapshot"
	"golang.org/x/sys/unix"
)

// SnapshotOptions say how a snapshot is taken.
type SnapshotOptions struct {
	snapshot.Options
	// Stop ends the VM when the snapshot is complete. Otherwise the guest goes on, after it
	// has stood still for as long as at the end of a migration.
	Stop bool
	// Migration are the limits, as for a migration.
	Migration migrate.Options
}

// Snapshot keeps the guest in the directory dir, which must not exist, while it runs. It
// returns when all is complete and on disk; after an error nothing is left of it and the
// guest goes on. [NewRestored] makes a VM of it.
func (v *VM) Snapshot(ctx context.Context, dir string, opt SnapshotOptions) (*snapshot.Manifest, migrate.Result, error) {
	ln := newLocal()
	k, err := snapshot.Keep(dir, ln, opt.Options)
	if err != nil {
		return nil, migrate.Result{}, kind.Invalid("%w", err)
	}
	o := opt.Migration
	o.Dial = ln.dial
	o.Snapshot = &migrate.Snapshot{Stop: opt.Stop, Patience: snapshot.Patience(opt.Disks, snapshot.Clones(dir, v.images()))}
	res, err := v.Migrate(ctx, dir, o)
	manifest, err := k.Close(err)
	return manifest, res, err
}

// images are the files of the guest's disks.
func (v *VM) images() (paths []string) {
	if m := v.current(); m != nil {
		for _, d := range m.Spec().Devices {
			if disk, ok := d.(*blk.Spec); ok {
				paths = append(paths, disk.Path)
			}
		}
	}
	return paths
}

// local connects the two sides of a migration within this process, by pairs of sockets.
type local struct {
	conns chan net.Conn
	over  chan struct{}
}

func newLocal() *local { return &local{make(chan net.Conn), make(chan struct{})} }

func (l *local) dial(ctx context.Context, _ string) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket pair")
		c, cerr := net.FileConn(f)
		err = errors.Join(err, cerr, f.Close())
		ends[i] = c
	}
	if err != nil {
		return nil, err
	}
	select {
	case l.conns <- ends[1]:
		return ends[0], nil
	case <-l.over:
		err = net.ErrClosed
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return nil, errors.Join(err, ends[0].Close(), ends[1].Close())
}

// Accept implements [net.Listener].
func (l *local) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.over:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (l *local) Close() error {
	close(l.over) // once: by the receiver
	return nil
}

// Addr implements [net.Listener].
func (l *local) Addr() net.Addr { return &net.UnixAddr{Name: "this process", Net: "unix"} }

// RestoreConfig says how a guest is restored. The snapshot brings the description of its
// machine along.
type RestoreConfig struct {
	Mode       snapshot.Mode         // "": snapshot.Auto
	Name       string                // "": as in the snapshot
	Backing    memory.Backing        // as in ReceiveConfig
	Tracking   machine.DirtyTracking // "": machine.TrackAuto
	Overcommit bool                  // as in Config
	Serial     serial.Backend        // as in Config
	Console    serial.Backend        // as in Config, for a guest that has a virtio console
	// Devices and AllowSourcePaths are as in ReceiveConfig; the source is whoever made the
	// snapshot.
	Devices          []virtio.Spec
	AllowSourcePaths bool
	// DiskDir is a directory in which the VM gets disks of its own, made of those in the
	// snapshot: NAME-disk0.img and so on, which must not exist. "": Devices has all.
	DiskDir string
	// NewIdentity gives the guest other MAC addresses and another vsock CID than in the
	// snapshot: those of Devices, or random ones.
	NewIdentity bool
	Kinds       []virtio.Kind        // as in Config
	DiskReader  machine.KernelReader // as in ReceiveConfig
	Log         *slog.Logger         // as in Config
}

// NewRestored makes a VM of a snapshot. Its guest goes on where it was when [VM.Run] is
// called. The snapshot may be closed then, and its directory stays as it is; while a guest
// runs whose memory was restored lazily, nobody may change it.
func NewRestored(ctx context.Context, s *snapshot.Snapshot, cfg RestoreConfig) (*VM, error) {
	if err := machine.MakeAbsolute(cfg.Devices); err != nil {
		return nil, err
	}
	if err := prepare(cfg.Devices, false); err != nil {
		return nil, err
	}
	undo := func() {}
	if cfg.DiskDir != "" {
		name := cfg.Name
		if name == "" {
			name = s.Name
		}
		disks, remove, err := s.MakeDisks(ctx, cfg.DiskDir, name)
		if err != nil {
			return nil, err
		}
		cfg.Devices, undo = append(cfg.Devices[:len(cfg.Devices):len(cfg.Devices)], disks...), remove
	}
	v := newVM(cfg.Name, cfg.Serial, cfg.Console, cfg.Log)
	if cfg.Backing == "" && s.Maps(cfg.Mode) {
		cfg.Backing = memory.Anonymous // what it will have after a reset
	}
	b := &machine.Builder{Ends: v.ends, Devices: cfg.Devices, AllowSourcePaths: cfg.AllowSourcePaths, Kinds: cfg.Kinds, Backing: cfg.Backing,
		Tracking: cfg.Tracking, Overcommit: cfg.Overcommit, Name: cfg.Name, NewIdentity: cfg.NewIdentity, Reader: cfg.DiskReader, Log: v.log}
	m, err := s.Restore(ctx, b, cfg.Mode)
	if err == nil {
		if err = m.Acquire(); err != nil { // before anybody is told that it runs
			err = errors.Join(err, m.Close())
		}
	}
	if err != nil {
		undo()
		return nil, err
	}
	closeUnneeded(cfg.DiskReader, m)
	v.machine = m
	v.started = func() { s.Prefetch(m) }
	return v, nil
}

// Spec describes the VM's machine; ok is false as long as there is none.
func (v *VM) Spec() (spec machine.Spec, ok bool) {
	m := v.current()
	if m == nil {
		return spec, false
	}
	return m.Spec(), true
}

// DeviceSpecs are the devices of the machine, with what they use of this host.
func (v *VM) DeviceSpecs() []virtio.Spec {
	if m := v.current(); m != nil {
		return m.Spec().Devices
	}
	return nil
}
