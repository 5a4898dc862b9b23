package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/govmm/govmm/internal/screen"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// topFlags are the flags of govmm top.
type topFlags struct {
	interval time.Duration
	count    int
	json     bool
	sort     string
	reverse  bool
	tlsDir   string
}

func newTop() *cobra.Command {
	var f topFlags
	keys := sortable(topColumns)
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Watch all VMs: processor, memory, disks, networks, migrations",
		Long: `Watch all VMs of this user: processor time, memory, what disks and networks move a
second, and migrations. On a terminal it has the whole screen, and keys that pause a VM,
migrate it or open its console; h lists them. Otherwise, and with --count or --json, it
prints one table an interval.

A VM that was started with --api-socket is not in the list.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case f.interval < minWatch || f.interval > maxWatch:
				return usagef(cmd, "--interval %v: must be between %v and %v", f.interval, minWatch, maxWatch)
			case f.count < 0:
				return usagef(cmd, "--count %d: must not be negative", f.count)
			case !slices.Contains(keys, f.sort):
				return usagef(cmd, "--sort %.80q: expected one of %s", f.sort, strings.Join(keys, ", "))
			}
			if err := f.run(cmd); err != nil {
				return fmt.Errorf("top: %w", err)
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.DurationVar(&f.interval, "interval", time.Second, "`TIME` between two readings")
	flags.IntVar(&f.count, "count", 0, "print `N` tables, one an interval, and end; 0: on a terminal the screen, otherwise tables without end")
	flags.BoolVar(&f.json, "json", false, "print one JSON object a line, one an interval")
	flags.StringVar(&f.sort, "sort", "name", "`COLUMN` by which VMs are sorted: "+strings.Join(keys, ", "))
	flags.BoolVar(&f.reverse, "reverse", false, "sort the other way round")
	registerTLSDir(cmd, &f.tlsDir)
	_ = cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(keys, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// The bounds of --interval.
const (
	minWatch = 100 * time.Millisecond
	maxWatch = time.Hour
)

// allVMs are those that ps lists.
func allVMs() ([]api.Entry, error) { return api.Sockets(api.Directory()) }

func (f *topFlags) run(cmd *cobra.Command) error {
	fleet := newFleet(f.sort)
	fleet.reverse = f.reverse
	poll := newPoller(allVMs)
	terminal := wholeTerminal(cmd)
	if terminal == nil || f.json || f.count > 0 {
		show := func(at time.Time) error { return printTop(cmd.OutOrStdout(), at, fleet) }
		if f.json {
			show = func(at time.Time) error { return printJSON(cmd.OutOrStdout(), topJSON(at, f.interval, fleet)) }
		}
		return poll.tables(cmd.Context(), fleet, f.interval, f.count, show)
	}
	return watchScreen(cmd.Context(), terminal, &topView{title: "govmm top", columns: topColumns, fleet: fleet, interval: f.interval, acts: true, tlsDir: f.tlsDir}, poll)
}

// wholeTerminal returns the terminal that a command may draw on, nil if there is none.
func wholeTerminal(cmd *cobra.Command) *os.File {
	in, ok := cmd.InOrStdin().(*os.File)
	out, ok2 := cmd.OutOrStdout().(*os.File)
	kind := os.Getenv("TERM")
	if !ok || !ok2 || kind == "" || kind == "dumb" || !term.IsTerminal(int(in.Fd())) || !term.IsTerminal(int(out.Fd())) {
		return nil
	}
	return in
}

// watchScreen shows a table of VMs on a terminal until the user leaves, or a signal comes.
func watchScreen(ctx context.Context, terminal *os.File, v *topView, poll *poller) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	s, err := screen.Open(terminal, []string{"/proc/self/exe", watchTerminal})
	if err != nil {
		return err
	}
	err = v.run(ctx, s, poll)
	return errors.Join(err, s.Close())
}

// tables shows all VMs once an interval, count times; 0: until ctx ends. The rates of the
// first time are those of the first interval.
func (p *poller) tables(ctx context.Context, f *fleet, interval time.Duration, count int, show func(time.Time) error) error {
	next := time.NewTicker(interval)
	defer next.Stop()
	for n := 0; ; n++ {
		if err := p.gather(ctx, f, min(interval/2, answerTime)); err != nil {
			return err
		}
		if n > 0 {
			if err := show(time.Now()); err != nil || n == count {
				return err
			}
		}
		select {
		case <-next.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// gather asks all VMs, and waits for their answers, but not longer than a time: a VM that
// takes longer is shown as it was, and one that never answered as one that does not.
func (p *poller) gather(ctx context.Context, f *fleet, within time.Duration) error {
	gone, err := p.ask(ctx)
	if err != nil {
		return err
	}
	f.forget(gone)
	late := time.After(within)
	for len(p.asked) > 0 {
		select {
		case r := <-p.answers:
			if p.took(r) {
				f.apply(r)
			}
		case <-late:
			for name := range p.asked {
				if f.rows[name] == nil {
					f.rows[name] = &vmRow{name: name, state: stateSilent}
				}
			}
			return nil
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

// printTop prints a table.
func printTop(out io.Writer, at time.Time, f *fleet) error {
	rows := f.sorted()
	t := fit(topColumns, rows, "", 0)
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %s\n%s\n", at.Local().Format(time.DateTime), countVMs(len(rows)), t.header(false))
	for _, r := range rows {
		b.WriteString(t.row(r) + "\n")
	}
	b.WriteByte('\n')
	_, err := io.WriteString(out, b.String())
	return err
}

func countVMs(n int) string {
	if n == 1 {
		return "1 VM"
	}
	return fmt.Sprintf("%d VMs", n)
}

// topReading is a line of top --json.
type topReading struct {
	Time       time.Time `json:"time"`
	IntervalMS int64     `json:"interval_ms"`
	VMs        []topVM   `json:"vms"`
}

// topVM is one VM of it. What is not known is absent.
type topVM struct {
	Name              string                   `json:"name"`
	State             vmm.State                `json:"state"` // "no answer" besides those of the API
	PID               int                      `json:"pid,omitempty"`
	CPUs              int                      `json:"cpus,omitempty"`
	CPUPercent        *float64                 `json:"cpu_percent,omitempty"` // 100: one processor
	Memory            uint64                   `json:"memory,omitempty"`      // bytes, as all that follow
	Balloon           uint64                   `json:"balloon,omitempty"`
	Resident          uint64                   `json:"resident,omitempty"`
	DiskReadPerSecond *float64                 `json:"disk_read_bytes_per_second,omitempty"`
	DiskWritPerSecond *float64                 `json:"disk_written_bytes_per_second,omitempty"`
	NetRxPerSecond    *float64                 `json:"net_received_bytes_per_second,omitempty"`
	NetTxPerSecond    *float64                 `json:"net_sent_bytes_per_second,omitempty"`
	DirtyPerSecond    *float64                 `json:"dirty_bytes_per_second,omitempty"` // while it migrates
	Migration         *migrate.Progress        `json:"migration,omitempty"`
	Incoming          *migrate.ReceiveProgress `json:"incoming,omitempty"`
	Error             string                   `json:"error,omitempty"`
}

func topJSON(at time.Time, interval time.Duration, f *fleet) topReading {
	known := func(r rate, times float64) *float64 {
		if !r.ok {
			return nil
		}
		v := math.Round(r.perSecond*times*10) / 10
		return &v
	}
	reading := topReading{Time: at, IntervalMS: interval.Milliseconds(), VMs: []topVM{}}
	for _, r := range f.sorted() {
		vm := topVM{Name: r.name, State: r.state, PID: r.info.PID, CPUs: r.info.CPUs, CPUPercent: known(r.cpu, 100), Memory: r.info.Memory,
			Balloon: r.balloon, Resident: r.use.resident, DiskReadPerSecond: known(r.diskRead, 1), DiskWritPerSecond: known(r.diskWrit, 1),
			NetRxPerSecond: known(r.netRx, 1), NetTxPerSecond: known(r.netTx, 1), DirtyPerSecond: known(r.dirtyRate(), 1), Migration: r.info.Migration, Incoming: r.info.Incoming}
		if r.err != nil {
			vm.Error = r.err.Error()
		}
		reading.VMs = append(reading.VMs, vm)
	}
	return reading
}
