package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

// migrateFlags are the flags of govmm migrate.
type migrateFlags struct {
	clientFlags
	to        string
	downtime  time.Duration
	bandwidth rateFlag
	timeout   time.Duration
	maxRounds int
	converge  bool
	shift     uint
	channels  int
	compress  string
	progress  string
	cancel    bool
	estimate  bool
	interval  time.Duration
	copyDisks bool
	verify    bool
	check     bool
	id        string
	paused    bool
	hints     string
	hintWait  time.Duration
	postcopy  string
	recover   bool

	tlsDir     string
	serverName string

	report reportFlag

	source *api.Client
	guest  string // after a failure: where it is
	moved  bool   // the guest is at the destination, or may be
}

func newMigrate() *cobra.Command {
	f := migrateFlags{clientFlags: guestFlags()}
	cmd := &cobra.Command{
		Use:   "migrate [NAME] --to HOST:PORT|unix:PATH",
		Short: "Move a VM to a process that waits for it (govmm receive)",
		Long: `Move a VM, while it runs, to a process that waits for it (govmm receive).

The command waits for the end. Ctrl-C cancels the migration, and the guest goes on
here; so does --cancel from another terminal. If the command is killed the
migration goes on.

Exit status: 0 done, 1 failed (no such VM, for example), 2 usage, 3 the destination does not take
the guest, 4 failed while the guest ran, 5 failed while the guest stood still, 6 cancelled, 7 it is
not known how the migration ended. After 3 to 6 the guest goes on here.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := f.request(cmd)
			if err != nil {
				return err
			}
			if f.estimate {
				return f.runEstimate(cmd, args, req)
			}
			if f.check {
				return f.runCheck(cmd, args, req)
			}
			return f.run(cmd, args, req)
		},
	}
	f.register(cmd)
	def := migrate.DefaultOptions()
	flags := cmd.Flags()
	flags.StringVar(&f.to, "to", "", "`ADDRESS` that govmm receive prints: HOST:PORT or unix:PATH")
	registerTLSDir(cmd, &f.tlsDir)
	flags.StringVar(&f.serverName, "tls-server-name", "", "`NAME` or IP address that the receiver's certificate must carry, instead of the HOST of --to")
	flags.DurationVar(&f.downtime, "downtime-limit", def.DowntimeLimit, "`TIME` that the guest may stand still, as in 300ms")
	flags.Var(&f.bandwidth, "bandwidth-limit", "bytes a second while the guest runs, as in 100M or 100M/s")
	flags.DurationVar(&f.timeout, "timeout", def.Timeout, "give up after this `TIME`; the guest goes on here")
	flags.IntVar(&f.maxRounds, "max-rounds", def.MaxRounds, "give up after `N` rounds; 0: no limit")
	flags.BoolVar(&f.converge, "auto-converge", false, "slow the guest down in steps, up to 99%, when rounds stop shrinking")
	flags.UintVar(&f.shift, "clear-bitmap-shift", def.ClearBitmapShift, "clear the dirty log in chunks of 2^`N` pages, N between 6 and 31")
	flags.StringVar(&f.hints, "hints", string(def.Hints), "`WHETHER` to ask the guest's balloon which pages are free: auto, on or off")
	flags.DurationVar(&f.hintWait, "hint-wait", def.HintWait, "`TIME` that the first round waits for the guest's answer, at most")
	flags.IntVar(&f.channels, "channels", def.Channels, "`N` connections that carry pages, between 1 and "+strconv.Itoa(migrate.MaxChannels))
	flags.StringVar(&f.compress, "compress", string(def.Compression), "compress pages by `METHOD`: zstd, lz4 or none; for slow links")
	flags.BoolVar(&f.copyDisks, "copy-disks", false, "copy the disks that the receiver does not reach, while the guest runs (govmm receive --disk-dir)")
	flags.StringVar(&f.progress, "progress", "auto", "`HOW`: auto, a live line if stderr is a terminal, or none")
	flags.StringVar(&f.report.path, "report", "", "write a page with plots about the migration to `FILE` (HTML), whatever becomes of it")
	flags.BoolVar(&f.estimate, "estimate", false, "move nothing: say what the migration would take")
	flags.DurationVar(&f.interval, "interval", migrate.DefaultRateInterval, "`TIME` for which --estimate watches what the guest writes")
	flags.BoolVar(&f.check, "check", false, "move nothing: say everything that keeps the guest from going there")
	flags.StringVar(&f.id, "id", "", "`ID` of the migration: asked for a second time, it is the same one (govmm migrations)")
	flags.BoolVar(&f.paused, "paused", false, "pause the guest first: it arrives paused, and goes on with govmm resume")
	flags.BoolVar(&f.cancel, "cancel", false, "cancel the VM's migration and wait until it has ended")
	flags.BoolVar(&f.verify, "verify-pages", false, "compare a hash of every page at both sides while both stand still")
	flags.StringVar(&f.postcopy, "postcopy", "", "let the guest move before all of its memory has, `WHEN` rounds stop shrinking (auto) or after N of them; the rest follows, and until it has the guest needs the processes of both hosts")
	flags.BoolVar(&f.recover, "recover", false, "the guest has moved and connections were lost before all of its memory had: connect again now, to another address of its host if --to gives one")
	flags.Lookup("postcopy").NoOptDefVal = "auto"
	_ = flags.MarkHidden("verify-pages") // for tests: to hash all memory lengthens the downtime
	return cmd
}

// request turns the flags into a request, or says what is wrong with them.
func (f *migrateFlags) request(cmd *cobra.Command) (api.MigrateRequest, error) {
	to, err := f.address()
	req := api.MigrateRequest{
		To: to, DowntimeLimit: api.Duration(f.downtime), BandwidthLimit: uint64(f.bandwidth), Timeout: api.Duration(f.timeout),
		MaxRounds: f.maxRounds, AutoConverge: f.converge, ClearBitmapShift: f.shift, VerifyPages: f.verify,
		Channels: f.channels, Compress: f.compress, Hints: f.hints, HintWait: api.Duration(max(f.hintWait, 1)), CopyDisks: f.copyDisks,
		Postcopy: f.postcopy, ID: f.id, Trigger: "cli",
	}
	switch {
	case err != nil:
	case f.progress != "auto" && f.progress != "none":
		err = fmt.Errorf("--progress %q: expected auto or none", f.progress)
	case f.cancel && f.estimate, f.cancel && f.check, f.estimate && f.check:
		err = errors.New("--cancel, --check and --estimate exclude each other")
	case f.paused && (f.cancel || f.estimate || f.check):
		err = errors.New("--paused is for a migration")
	case f.estimate && checkInterval(f.interval) != nil:
		err = checkInterval(f.interval)
	case f.recover && (f.cancel || f.estimate || f.postcopy != ""):
		err = errors.New("--recover goes with no other flag than --to")
	case f.recover:
		if f.to != "" {
			err = api.ValidateAddress(to)
		}
	case f.cancel && f.to != "":
		err = errors.New("--cancel and --to exclude each other")
	case f.cancel:
	case f.to == "":
		err = errors.New("--to HOST:PORT is missing: the address that govmm receive prints")
	case f.downtime <= 0 || f.timeout <= 0:
		err = errors.New("--downtime-limit and --timeout must be more than 0")
	case f.hints == "":
		err = errors.New("--hints \"\": expected auto, on or off")
	case f.hintWait < 0:
		err = fmt.Errorf("--hint-wait %v: must not be negative", f.hintWait)
	case f.shift == 0:
		err = errors.New("--clear-bitmap-shift 0: must be between 6 and 31")
	case f.channels == 0:
		err = fmt.Errorf("--channels 0: must be between 1 and %d", migrate.MaxChannels)
	case f.compress == "":
		err = errors.New("--compress \"\": expected zstd, lz4 or none")
	default:
		if _, err = req.Options(); err == nil {
			err = f.checkTLS()
		}
	}
	if err != nil {
		return req, usagef(cmd, "%v", err)
	}
	return req, nil
}

// run migrates or cancels, and prints the outcome: with --json one object on
// stdout, always.
func (f *migrateFlags) run(cmd *cobra.Command, args []string, req api.MigrateRequest) error {
	res, err := f.migrate(cmd, args, req)
	expected := "completed"
	if f.cancel {
		expected = "cancelled"
	}
	if err == nil && res.Status != expected {
		err = f.outcome(res)
	}
	if f.json {
		if err2 := printJSON(cmd.OutOrStdout(), jsonResult(res, err)); err == nil {
			err = err2
		}
	} else if err == nil && !f.cancel {
		err = printResult(cmd.OutOrStdout(), res)
	}
	if rerr := f.report.write(f.to, jsonResult(res, err)); err == nil {
		err = rerr
	}
	if f.hints == string(migrate.HintsOn) && res.HintsReceived == 0 && res.HintsOff != "" {
		_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "govmm: migrated without free-page hints: "+res.HintsOff)
	}
	if res.Status == "completed" && f.source != nil {
		// Its process is about to end. After that the name is free, and a command
		// without NAME means another VM. If it takes long the migration has not
		// failed.
		_ = f.source.WaitGone(cmd.Context())
	}
	if err != nil {
		return &exitError{fmt.Errorf("%s: %w", f.tried(cmd, args), err), exitStatus(res, err)}
	}
	if f.cancel {
		_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "govmm: the migration is cancelled; the guest goes on here")
	}
	return nil
}

func (f *migrateFlags) tried(cmd *cobra.Command, args []string) string {
	switch {
	case f.cancel:
		return tried(cmd, args) + " --cancel"
	case f.recover:
		return tried(cmd, args) + " --recover"
	}
	return tried(cmd, args) + " to " + f.to
}

// outcome says in one line what a migration that was not completed, or not
// cancelled, means for the guest.
func (f *migrateFlags) outcome(res migrate.Result) error {
	switch {
	case f.cancel && res.Status == "completed":
		return errors.New("too late: the migration was completed, the guest runs at the destination")
	case res.Status == "cancelled":
		return errors.New("cancelled; the guest goes on here")
	case f.guest == "" || strings.Contains(res.Error, f.guest):
		return errors.New(res.Error)
	}
	return errors.New(res.Error + "; " + f.guest)
}

// jsonResult is what --json prints: after an error of this command the status is
// failed.
func jsonResult(res migrate.Result, err error) migrate.Result {
	if res.Status == "" {
		res.Status = "failed"
	}
	if err != nil && res.Error == "" {
		res.Error = err.Error()
	}
	if res.Rounds == nil {
		res.Rounds = []migrate.RoundStats{}
	}
	if res.ChannelBytes == nil {
		res.ChannelBytes = []uint64{}
	}
	return res
}

// migrate finds the VM, starts or cancels, and follows to the end. After an error
// the result is not known, and what is returned is the last progress.
func (f *migrateFlags) migrate(cmd *cobra.Command, args []string, req api.MigrateRequest) (migrate.Result, error) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)

	var err error
	if req.TLS, err = f.credentials(); err != nil {
		return migrate.Result{}, err
	}
	c, err := f.client(cmd.Context(), args)
	if err != nil {
		return migrate.Result{}, err
	}
	f.source = c
	f.report.begin(cmd.Context(), c)
	fol := follower{client: c, signals: signals, stderr: cmd.ErrOrStderr(),
		line: newProgressLine(cmd.ErrOrStderr(), f.progress), patience: unknownPatience}
	if f.recover {
		if err := c.Recover(cmd.Context(), req.To); err != nil {
			return migrate.Result{}, advise(err)
		}
		return fol.follow(cmd.Context(), c.Follow)
	}
	if f.postcopy != "" {
		_, _ = fmt.Fprintln(cmd.ErrOrStderr(), "govmm: "+postcopyWarning)
	}
	if f.cancel {
		if err := c.Cancel(cmd.Context()); err != nil {
			return migrate.Result{}, advise(err)
		}
		return fol.follow(cmd.Context(), c.Follow)
	}
	if f.paused {
		info, err := c.Info(cmd.Context())
		if err == nil && info.State != vmm.StatePaused {
			_, err = c.Pause(cmd.Context())
			defer f.unpause(cmd.Context(), c)
		}
		if err != nil {
			return migrate.Result{}, advise(err)
		}
	}
	res, err := fol.follow(cmd.Context(), func(ctx context.Context, progress func(migrate.Progress)) (migrate.Result, error) {
		return c.Migrate(ctx, req, progress)
	})
	f.moved = err != nil || res.Status == "completed"
	if err == nil && res.Status == "failed" {
		f.guest = whereabouts(cmd.Context(), c)
	}
	return res, err
}

// whereabouts says where the guest is after a migration that failed.
func whereabouts(ctx context.Context, c *api.Client) string {
	info, err := c.Info(ctx)
	switch {
	case err != nil:
		return "the VM does not answer any more"
	case info.State == vmm.StateRunning, info.State == vmm.StateMigrating: // the migration may need a moment to be over
		return "the guest goes on here"
	}
	return "the guest is " + string(info.State) + " here"
}
