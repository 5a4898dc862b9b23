package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/api"
	"github.com/govmm/govmm/vmm/sandbox"
	"github.com/spf13/cobra"
)

// upgradeFlags are the flags of govmm upgrade.
type upgradeFlags struct {
	clientFlags
	binary   string
	sandbox  string
	progress string
}

func newUpgrade() *cobra.Command {
	f := upgradeFlags{clientFlags: guestFlags()}
	cmd := &cobra.Command{
		Use:   "upgrade [NAME]",
		Short: "Let a VM's guest go on in a new process, of another version perhaps",
		Long: `Let a VM's guest go on in a new process of this host, of another version
perhaps, while it runs.

The new process takes over the name, the API socket, disks, taps and the guest's
lines. Memory of --memory-backing memfd and hugetlb is handed over as it is;
anonymous memory is copied, which needs as much again meanwhile. If the new
process cannot take the guest, for any reason, the guest goes on where it is.

The process that was started at first stays, without the guest, for who waits for
it: it passes on signals and the terminal, and ends as the new process does. A
service manager is told of the new process instead (NOTIFY_SOCKET).`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.progress != "auto" && f.progress != "none" {
				return usagef(cmd, "--progress %q: expected auto or none", f.progress)
			}
			if _, err := sandbox.ParseMode(f.sandbox); err != nil {
				return usagef(cmd, "--sandbox: %v", err)
			}
			return f.run(cmd, args)
		},
	}
	f.register(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.binary, "binary", "", "the govmm that the new process runs, a `FILE`; none: this one")
	flags.StringVar(&f.sandbox, "sandbox", string(sandbox.Auto), "`WHAT` the new process does about its system calls, as for govmm run: on, log or off; auto is on, and allows it to lack what the process before lacks")
	flags.StringVar(&f.progress, "progress", "auto", "`HOW`: auto, a live line if stderr is a terminal, or none")
	return cmd
}

// upgradeResult is what --json prints: the result of the migration between the two
// processes, and what they are.
type upgradeResult struct {
	migrate.Result
	Memory  string // shared or sent
	OldPID  int
	PID     int    // of the process that has the guest now
	Version string // of the new binary
}

// MarshalJSON implements [json.Marshaler]: one object with the fields of both.
func (r upgradeResult) MarshalJSON() ([]byte, error) {
	result, err := json.Marshal(r.Result)
	if err != nil {
		return nil, err
	}
	more, err := json.Marshal(struct {
		Memory  string `json:"memory"`
		OldPID  int    `json:"old_pid"`
		PID     int    `json:"pid"`
		Version string `json:"version"`
	}{r.Memory, r.OldPID, r.PID, r.Version})
	if err != nil {
		return nil, err
	}
	return append(append(result[:len(result)-1:len(result)-1], ','), more[1:]...), nil
}

// run upgrades and prints the outcome: with --json one object on stdout, always.
func (f *upgradeFlags) run(cmd *cobra.Command, args []string) error {
	var res upgradeResult
	err := f.upgrade(cmd, args, &res)
	if err == nil && res.Status != "completed" {
		err = errors.New(res.Error)
		if res.Status == "cancelled" {
			err = errors.New("cancelled; the guest goes on where it was")
		}
	}
	if f.json {
		res.Result = jsonResult(res.Result, err)
		if err2 := printJSON(cmd.OutOrStdout(), res); err == nil {
			err = err2
		}
	} else if err == nil {
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "the guest goes on in process %d (govmm %s); it stood still for %.1f ms\n", res.PID, res.Version, float64(res.Downtime.Microseconds())/1000)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", tried(cmd, args), err)
	}
	return nil
}

func (f *upgradeFlags) upgrade(cmd *cobra.Command, args []string, res *upgradeResult) error {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	ctx := cmd.Context()
	c, err := f.client(ctx, args)
	if err != nil {
		return err
	}
	info, err := c.Info(ctx)
	if err != nil {
		return advise(err)
	}
	res.OldPID, res.PID = info.PID, info.PID
	if mode := info.Sandbox.Mode; mode != sandbox.On && mode != "" && !cmd.Flags().Changed("sandbox") {
		return fmt.Errorf("the VM's process runs with --sandbox %s: say for the new one, too (--sandbox %s), or --sandbox on", mode, mode)
	}
	f.sandbox = heirSandbox(f.sandbox, info.Sandbox)
	if f.binary == "" {
		if f.binary, err = os.Executable(); err != nil {
			return err
		}
	}
	if f.binary, err = filepath.Abs(f.binary); err != nil {
		return err
	}
	if res.Version, err = checkBinary(ctx, f.binary); err != nil {
		return err
	}
	child, err := f.start(ctx, cmd, c, info, res)
	if err != nil {
		return err
	}
	fol := follower{client: c, signals: signals, stderr: cmd.ErrOrStderr(), line: newProgressLine(cmd.ErrOrStderr(), f.progress), patience: unknownPatience}
	res.Result, err = fol.follow(ctx, c.Follow)
	if err == nil && res.Status == "completed" {
		res.PID = child.pid
		return f.awaitHere(ctx, c, child)
	}
	if err == nil { // the VM's process says that the guest goes on there
		if said := child.end(); said != "" && res.Error != "" {
			res.Error += "; it printed: " + said
		}
	}
	return err
}

// heirSandbox is the mode of the new process: it lacks only what the one before lacks.
func heirSandbox(flag string, before sandbox.Status) string {
	if flag == string(sandbox.Auto) && before.Landlock > 0 && before.Seccomp {
		return string(sandbox.On)
	}
	return flag
}

// start begins the upgrade and starts the new process.
func (f *upgradeFlags) start(ctx context.Context, cmd *cobra.Command, c *api.Client, info api.Info, res *upgradeResult) (*heirProcess, error) {
	conn, shared, err := c.Upgrade(ctx)
	if err != nil {
		return nil, advise(err)
	}
	defer conn.Close()
	if res.Memory = "shared"; !shared {
		res.Memory = "sent"
		_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "govmm: the guest's memory is anonymous: it is copied to the new process, which takes as much as the guest has used of its %v again until it is done (--memory-backing memfd is not copied)\n", formatSize(info.Memory))
	}
	child, err := startHeir(f.binary, c.Socket(), f.sandbox, conn, info.PID, func(format string, a ...any) {
		_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "govmm: "+format+"\n", a...)
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w; the guest goes on where it was", f.binary, err)
	}
	return child, nil
}

// hereTime bounds how long the command waits for the first answer of the new process.
const hereTime = 10 * time.Second

// awaitHere waits until the new process answers at the API socket.
func (f *upgradeFlags) awaitHere(ctx context.Context, c *api.Client, child *heirProcess) error {
	for end := time.Now().Add(hereTime); ; time.Sleep(2 * time.Millisecond) {
		info, err := c.Info(ctx)
		switch {
		case err == nil && info.PID == child.pid:
			return nil
		case child.hasEnded(): // the guest was quick to power off, or it was killed
			return nil
		case time.Now().After(end) && err != nil:
			return fmt.Errorf("the new process has the guest and does not answer: %w", err)
		case time.Now().After(end):
			return errors.New("the new process has the guest and does not answer")
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
}
