package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/report"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

// exitStatus is the status of a govmm migrate that has failed.
func exitStatus(res migrate.Result, err error) int {
	switch {
	case errors.Is(err, errHandoffUnknown), errors.Is(err, errDied), errors.Is(err, errLeft), res.Reason == report.ReasonHandoffUnknown:
		return exitUnknown
	case res.Reason == report.ReasonRefused:
		return exitRefused
	case res.Status == string(migrate.PhaseCancelled):
		return exitCancelled
	case res.FailedIn == migrate.PhaseSwitchover, res.FailedIn == migrate.PhaseHandoffUnknown:
		return exitInStop
	case res.FailedIn != "":
		return exitBefore
	}
	return exitFailed
}

// unpause lets the guest go on that --paused has stopped, if it is still here.
func (f *migrateFlags) unpause(ctx context.Context, c *api.Client) {
	if !f.moved {
		_, _ = c.Resume(context.WithoutCancel(ctx), false)
	}
}

// runCheck asks the destination whether it would take the guest.
func (f *migrateFlags) runCheck(cmd *cobra.Command, args []string, req api.MigrateRequest) (err error) {
	if req.TLS, err = f.credentials(); err != nil {
		return err
	}
	ctx := cmd.Context()
	c, err := f.client(ctx, args)
	if err != nil {
		return fmt.Errorf("%s: %w", tried(cmd, args), err)
	}
	stop := newProgressLine(cmd.ErrOrStderr(), f.progress).during(waiting("asking " + plain(req.To)))
	r, err := c.CheckMigration(ctx, req)
	stop()
	if err != nil {
		return fmt.Errorf("%s: %w", f.tried(cmd, args), advise(err))
	}
	out := cmd.OutOrStdout()
	switch {
	case f.json:
		err = printJSON(out, r)
	case r.Possible:
		_, err = fmt.Fprintf(out, "the guest can go to %s: protocol %d, %s, a round trip of %.1f ms, %d channels, %s of memory\n",
			r.Address, r.Version, map[bool]string{true: "TLS", false: "plain"}[r.TLS], r.RTT, r.Channels, units.Bytes(r.RAMBytes))
	default:
		for _, reason := range r.Reasons {
			_, err = fmt.Fprintln(out, reason)
		}
	}
	if err == nil && !r.Possible {
		status := exitBefore
		if r.Reason == report.ReasonRefused {
			status = exitRefused
		}
		return &exitError{fmt.Errorf("%s --check: the guest cannot go to %s", tried(cmd, args), r.Address), status}
	}
	return err
}

// makeState makes the directory for records of migrations, before the sandbox. Without one a
// VM does without.
func (p *process) makeState() (err error) {
	p.state, err = api.MakeStateDirectory()
	return err
}

// keepRecord writes what there is to know of a migration that has ended: after one that was
// completed this process is gone.
func (p *process) keepRecord(r vmm.MigrationRecord) {
	if p.state == "" {
		return
	}
	if err := api.WriteRecord(p.state, r); err != nil {
		p.log.Warn("the record of the migration is not kept", "id", r.ID, "err", err)
	}
}

func newMigrations() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "migrations [ID]",
		Short: "List the migrations from this host, or show one",
		Long: `List the migrations of this user's VMs from this host, those that have ended too, the newest
first. Those of the last 30 days are kept, 1000 at most.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := allRecords(cmd.Context(), cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if id := nameOf(args); id != "" {
				for _, r := range all {
					if r.ID == id {
						return printRecord(cmd.OutOrStdout(), r, asJSON)
					}
				}
				return fmt.Errorf("migrations: there is none with the id %q", id)
			}
			if asJSON {
				for _, r := range all {
					if err := printJSON(cmd.OutOrStdout(), r); err != nil {
						return err
					}
				}
				return nil
			}
			return printRecords(cmd.OutOrStdout(), all)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON object a line for each")
	return cmd
}

// allRecords are those that are kept, and those that the VMs that run know of.
func allRecords(ctx context.Context, stderr io.Writer) ([]vmm.MigrationRecord, error) {
	var all []vmm.MigrationRecord
	for _, dir := range api.RecordDirectories() {
		kept, err := api.ReadRecords(dir)
		if err != nil { // the others can be read
			_, _ = fmt.Fprintln(stderr, "govmm: "+strings.ReplaceAll(err.Error(), "\n", "; "))
		}
		all = append(all, kept...)
	}
	known := map[string]bool{}
	for _, r := range all {
		known[r.ID] = true
	}
	entries, err := api.List(ctx, api.Directory())
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		live, err := e.Client.Migrations(ctx)
		cancel()
		if err != nil {
			continue // it has just ended, or hangs: the others count
		}
		for _, r := range live {
			if !known[r.ID] {
				all = append(all, r)
			}
		}
	}
	return api.SortRecords(all), nil
}

func printRecords(out io.Writer, all []vmm.MigrationRecord) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "ID\tVM\tTO\tSTARTED\tSTATUS\tTOTAL\tDOWNTIME\tBY")
	for _, r := range all {
		status, total, down := "under way", "", ""
		if r.Progress != nil {
			status = string(r.Progress.Phase)
		}
		if res := r.Result; res != nil {
			status = res.Status
			if res.Reason != "" && string(res.Reason) != res.Status {
				status += " (" + string(res.Reason) + ")"
			}
			total = res.Total.Round(time.Millisecond).String()
			if res.Status == string(migrate.PhaseCompleted) {
				down = res.Downtime.Round(100 * time.Microsecond).String()
			}
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.ID, r.VM, r.Address, r.Started.Local().Format("2006-01-02 15:04:05"), status, total, down, r.Trigger)
	}
	return w.Flush()
}

func printRecord(out io.Writer, r vmm.MigrationRecord, asJSON bool) error {
	if asJSON {
		return printJSON(out, r)
	}
	_, err := fmt.Fprintf(out, "migration %s of %s from %s to %s, started %s by %s\n", r.ID, r.VM, r.Host, r.Address, r.Started.Local().Format(time.DateTime), r.Trigger)
	switch {
	case err != nil || r.Result == nil:
		return err
	case r.Result.Status == string(migrate.PhaseCompleted):
		return printResult(out, *r.Result)
	}
	_, err = fmt.Fprintf(out, "%s in phase %s (%s): %s\n", r.Result.Status, r.Result.FailedIn, r.Result.Reason, r.Result.Error)
	return err
}

// received is a line of receive --json.
type received struct {
	Listening string `json:"listening,omitempty"` // the address for govmm migrate --to
	Arrived   string `json:"arrived,omitempty"`   // the name of the guest's VM
	Name      string `json:"name"`
	Socket    string `json:"api_socket"`
}

// tell prints a line for who runs this process in a script.
func (p *process) tell(r received) {
	if p.lines != nil {
		_ = printJSON(p.lines, r)
	}
}
