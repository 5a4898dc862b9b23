package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/vmm/api"
	"github.com/govmm/govmm/vmm/snapshot"
	"github.com/spf13/cobra"
)

// snapshotFlags are the flags of govmm snapshot.
type snapshotFlags struct {
	clientFlags
	to       string
	verify   string
	stop     bool
	disks    string
	compress string
	downtime time.Duration
	hints    string
	progress string

	opt snapshot.Options
}

func newSnapshot() *cobra.Command {
	f := snapshotFlags{clientFlags: guestFlags()}
	cmd := &cobra.Command{
		Use:   "snapshot [NAME] --to DIR",
		Short: "Keep a VM in a directory, while it runs; govmm run --from restores it",
		Long: `Keep a VM in a directory, while it runs; govmm run --from DIR restores it, as often
as you like.

The guest goes on meanwhile, and stands still for as long as at the end of a
migration. The directory must not exist; it appears when all is complete and on
disk. If the command is interrupted, or the disk is full, nothing of it is left
and the guest goes on.

Disks are not in the snapshot unless --disks says so: whoever restores it gives
disks that are as they were then.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(cmd, args); err != nil {
				return usagef(cmd, "%v", err)
			}
			if f.verify != "" {
				return f.runVerify(cmd)
			}
			return f.run(cmd, args)
		},
	}
	f.register(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.to, "to", "", "`DIR` that is made for the snapshot")
	flags.BoolVar(&f.stop, "stop", false, "end the VM when the snapshot is complete; it stands still until then")
	flags.StringVar(&f.disks, "disks", string(snapshot.DisksNone), "`WHAT` becomes of disks: none; reflink, clones that share blocks, or copies where the file system has no clones; or copy. They are made while the guest stands still, and a copy takes long")
	flags.StringVar(&f.compress, "compress", string(snapshot.CompressNone), "compress memory by `METHOD`: zstd or none; compressed memory cannot be restored lazily")
	flags.DurationVar(&f.downtime, "downtime-limit", migrate.DefaultOptions().DowntimeLimit, "`TIME` that the guest may stand still, as in 300ms")
	flags.StringVar(&f.hints, "hints", string(migrate.HintsAuto), "`WHETHER` to ask the guest's balloon which pages are free, and leave them out: auto, on or off")
	flags.StringVar(&f.progress, "progress", "auto", "`HOW`: auto, a live line if stderr is a terminal, or none")
	flags.StringVar(&f.verify, "verify", "", "take no snapshot: read all of the one in `DIR` and compare it with the sums of its manifest")
	return cmd
}

// check reports the first flag that makes no sense.
func (f *snapshotFlags) check(cmd *cobra.Command, args []string) (err error) {
	switch {
	case f.verify != "" && (f.to != "" || len(args) > 0 || f.stop):
		return errors.New("--verify reads a snapshot: it takes no NAME, --to or --stop")
	case f.progress != "auto" && f.progress != "none":
		return fmt.Errorf("--progress %q: expected auto or none", f.progress)
	case f.verify != "":
		return nil
	case f.to == "":
		return errors.New("--to DIR is missing: the directory that is made for the snapshot")
	case f.downtime < time.Millisecond:
		return fmt.Errorf("--downtime-limit %v: must be at least 1ms", f.downtime)
	case !slices.Contains([]migrate.HintMode{migrate.HintsAuto, migrate.HintsOn, migrate.HintsOff}, migrate.HintMode(f.hints)):
		return fmt.Errorf("--hints %q: expected auto, on or off", f.hints)
	}
	if f.opt.Disks, err = snapshot.ParseDisks(f.disks); err != nil {
		return fmt.Errorf("--disks: %w", err)
	}
	if f.opt.Compress, err = snapshot.ParseCompression(f.compress); err != nil {
		return fmt.Errorf("--compress: %w", err)
	}
	f.opt.Version = version()
	return nil
}

// snapshotResult is what --json prints.
type snapshotResult struct {
	Directory string             `json:"directory"`
	Status    string             `json:"status"` // completed, failed, cancelled
	Error     string             `json:"error"`
	Manifest  *snapshot.Manifest `json:"manifest,omitempty"`
	FileBytes uint64             `json:"file_bytes"` // that the files of the snapshot take on disk
	Migration migrate.Result     `json:"migration"`  // into the directory: rounds, and how long the guest stood still
}

// run takes a snapshot, and prints what it took.
func (f *snapshotFlags) run(cmd *cobra.Command, args []string) error {
	res, err := f.take(cmd, args)
	if f.json {
		res.Migration = jsonResult(res.Migration, err)
		if res.Status = res.Migration.Status; err != nil {
			res.Error = err.Error()
		}
		if err2 := printJSON(cmd.OutOrStdout(), res); err == nil {
			err = err2
		}
	} else if err == nil {
		err = f.print(cmd, res)
	}
	if err != nil {
		return fmt.Errorf("%s to %s: %w", tried(cmd, args), f.to, err)
	}
	return nil
}

func (f *snapshotFlags) print(cmd *cobra.Command, res snapshotResult) error {
	how := "the guest goes on"
	if f.stop {
		how = "the guest has ended"
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s: %s of %s memory, %s on disk, taken in %s; the guest stood still for %s; %s\n", res.Directory,
		units.Bytes(res.Manifest.Memory.DataBytes), units.Bytes(res.Manifest.Memory.Bytes), units.Bytes(res.FileBytes),
		formatMS(res.Migration.Total), formatMS(res.Migration.Downtime), how)
	return err
}

// take takes the snapshot.
func (f *snapshotFlags) take(cmd *cobra.Command, args []string) (res snapshotResult, err error) {
	if res.Directory, err = snapshot.CheckNew(f.to); err != nil {
		return res, err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	c, err := f.client(cmd.Context(), args)
	if err != nil {
		return res, err
	}
	info, err := c.Info(cmd.Context())
	if err != nil {
		return res, advise(err)
	}
	patience := f.patience(cmd, info)
	k, address, remove, err := f.keep(c, res.Directory)
	if err != nil {
		return res, err
	}
	defer remove()
	req := api.MigrateRequest{To: address, DowntimeLimit: api.Duration(f.downtime), Timeout: api.Duration(24 * time.Hour), Channels: snapshotChannels, Hints: f.hints,
		Snapshot: &api.Snapshot{Stop: f.stop, Patience: api.Duration(patience)}}
	fol := follower{client: c, signals: signals, stderr: cmd.ErrOrStderr(), line: newProgressLine(cmd.ErrOrStderr(), f.progress), patience: unknownPatience}
	fol.line.instead = func() string {
		if w := k.Work(); w.All > 0 {
			return counted(w.What, w.Done, w.All)
		}
		return ""
	}
	res.Migration, err = fol.follow(cmd.Context(), func(ctx context.Context, progress func(migrate.Progress)) (migrate.Result, error) {
		return c.Migrate(ctx, req, progress)
	})
	switch {
	case errors.Is(err, errDied): // it may have sent all before
		if k.Settle(cmd.Context()); cmd.Context().Err() == nil {
			err = nil
			defer func() {
				if err == nil {
					res.Migration.Status = "completed"
					_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "govmm: the VM's process has ended meanwhile; the snapshot is complete")
				} else {
					err = errors.New("the VM's process has ended before its guest was kept")
				}
			}()
		}
	case errors.Is(err, errLeft):
		err = errors.New("left; the snapshot is given up, and the guest goes on")
	case err == nil && res.Migration.Status == "cancelled":
		err = errors.New("cancelled; the guest goes on")
	case err == nil && res.Migration.Status != "completed":
		err = errors.New(res.Migration.Error)
	}
	manifest, err := k.Close(err)
	if err != nil {
		return res, err
	}
	res.Manifest, res.FileBytes = manifest, onDisk(res.Directory)
	if f.stop {
		_ = c.WaitGone(cmd.Context()) // the name is free then
	}
	return res, nil
}

// snapshotChannels is how many connections carry pages to the file.
const snapshotChannels = 2

// patience is how long the guest may stand still for its disks. It says so if that may be
// long.
func (f *snapshotFlags) patience(cmd *cobra.Command, info api.Info) time.Duration {
	var images []string
	for _, d := range info.Devices {
		if disk, ok := d.Info.(*blk.Info); ok {
			images = append(images, disk.Path)
		}
	}
	if f.opt.Disks == snapshot.DisksNone || len(images) == 0 {
		return time.Nanosecond // of no effect
	}
	clones := f.opt.Disks == snapshot.DisksReflink && snapshot.Clones(f.to, images)
	if !clones {
		_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "govmm: disks are copied, and the guest stands still meanwhile")
	}
	return snapshot.Patience(f.opt.Disks, clones)
}

// keep makes the socket that the VM sends itself to, in a directory that only its user and
// this one can enter.
func (f *snapshotFlags) keep(c *api.Client, dir string) (k *snapshot.Keeper, address string, remove func(), err error) {
	private, err := os.MkdirTemp("", "govmm-snapshot-")
	if err != nil {
		return nil, "", nil, err
	}
	remove = func() { _ = os.RemoveAll(private) }
	fail := func(err error) (*snapshot.Keeper, string, func(), error) {
		remove()
		return nil, "", nil, err
	}
	path := filepath.Join(private, "socket")
	ln, err := migrate.ListenUnix(path)
	if err != nil {
		return fail(err)
	}
	// A VM that was started with --user is another user's.
	if st, err := os.Stat(c.Socket()); err == nil {
		if uid := int(st.Sys().(*syscall.Stat_t).Uid); uid != os.Geteuid() {
			if err := errors.Join(os.Chown(path, uid, -1), os.Chown(private, uid, -1)); err != nil {
				return fail(errors.Join(fmt.Errorf("let the VM's user connect: %w", err), ln.Close()))
			}
			f.opt.User = uid
		}
	}
	if k, err = snapshot.Keep(dir, ln, f.opt); err != nil {
		return fail(errors.Join(err, ln.Close()))
	}
	return k, ln.Addr().String(), remove, nil
}

// onDisk is what the files of a directory take.
func onDisk(dir string) (total uint64) {
	files, _ := os.ReadDir(dir)
	for _, e := range files {
		if info, err := e.Info(); err == nil {
			total += uint64(info.Sys().(*syscall.Stat_t).Blocks) * 512
		}
	}
	return total
}

// runVerify checks a snapshot.
func (f *snapshotFlags) runVerify(cmd *cobra.Command) error {
	began := time.Now()
	s, err := snapshot.Open(f.verify)
	if err == nil {
		stop := newProgressLine(cmd.ErrOrStderr(), f.progress).during(readingMemory("reading the snapshot", s.Read, s.Manifest.Memory.Bytes))
		err = s.Verify(cmd.Context())
		stop()
		err = errors.Join(err, s.Close())
	}
	if err != nil {
		return fmt.Errorf("snapshot --verify: %w", err)
	}
	if f.json {
		return printJSON(cmd.OutOrStdout(), s.Manifest)
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: whole: %s of %s memory, read in %s\n", f.verify,
		units.Bytes(s.Manifest.Memory.DataBytes), units.Bytes(s.Manifest.Memory.Bytes), formatMS(time.Since(began)))
	return err
}
