package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

// dirtyRateFlags are the flags of govmm dirty-rate.
type dirtyRateFlags struct {
	clientFlags
	interval time.Duration
}

func newDirtyRate() *cobra.Command {
	f := dirtyRateFlags{clientFlags: guestFlags()}
	cmd := &cobra.Command{
		Use:   "dirty-rate [NAME]",
		Short: "Measure how fast a VM writes its memory",
		Long: `Measure how fast a VM writes its memory: how many different pages within a second,
and how many of them within a half, a quarter and so on. The guest runs on; the
first write to each page takes it a few microseconds longer.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkInterval(f.interval); err != nil {
				return usagef(cmd, "%v", err)
			}
			return f.run(cmd, args)
		},
	}
	f.register(cmd)
	cmd.Flags().DurationVar(&f.interval, "interval", migrate.DefaultRateInterval, "measure for this `TIME`, between 10ms and 1m")
	return cmd
}

func checkInterval(d time.Duration) error {
	if d < migrate.MinRateInterval || d > migrate.MaxRateInterval {
		return fmt.Errorf("--interval %v: must be between %v and %v", d, migrate.MinRateInterval, migrate.MaxRateInterval)
	}
	return nil
}

func (f *dirtyRateFlags) run(cmd *cobra.Command, args []string) error {
	c, err := f.client(cmd.Context(), args)
	if err != nil {
		return fmt.Errorf("%s: %w", tried(cmd, args), err)
	}
	stop := newProgressLine(cmd.ErrOrStderr(), "auto").during(measuring(f.interval, ""))
	rate, err := c.DirtyRate(cmd.Context(), api.DirtyRateRequest{Interval: api.Duration(f.interval)})
	stop()
	if err != nil {
		return fmt.Errorf("%s: %w", tried(cmd, args), advise(err))
	}
	if f.json {
		return printJSON(cmd.OutOrStdout(), rate)
	}
	return printDirtyRate(cmd.OutOrStdout(), rate)
}

func printDirtyRate(out io.Writer, r migrate.DirtyRate) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(cells ...string) { _, _ = fmt.Fprintln(w, strings.Join(cells, "\t")+"\t") }
	row("WITHIN", "PAGES", "WRITTEN")
	for _, s := range r.Samples {
		row(formatMS(s.After), strconv.FormatUint(s.Pages, 10), units.Bytes(s.Pages*mempage.Size))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "%s/s over %s, of %s of memory\n", units.Bytes(r.BytesPerSecond), formatMS(r.Interval), units.Bytes(r.RAMBytes))
	return err
}

// runEstimate prints what a migration would take; with --json one object.
func (f *migrateFlags) runEstimate(cmd *cobra.Command, args []string, req api.MigrateRequest) (err error) {
	if req.TLS, err = f.credentials(); err != nil {
		return fmt.Errorf("%s: %w", f.tried(cmd, args), err)
	}
	c, err := f.client(cmd.Context(), args)
	if err != nil {
		return fmt.Errorf("%s: %w", f.tried(cmd, args), err)
	}
	stop := newProgressLine(cmd.ErrOrStderr(), f.progress).during(measuring(f.interval, "looking at the guest's memory and the link"))
	e, err := c.Estimate(cmd.Context(), api.EstimateRequest{MigrateRequest: req, Interval: api.Duration(f.interval)})
	stop()
	if err != nil {
		return fmt.Errorf("%s: %w", f.tried(cmd, args), advise(err))
	}
	if f.json {
		return printJSON(cmd.OutOrStdout(), e)
	}
	return printEstimate(cmd.OutOrStdout(), e)
}

func printEstimate(out io.Writer, e migrate.Estimate) error {
	rounds := "1 round"
	if e.Rounds != 1 {
		rounds = fmt.Sprintf("%d rounds", e.Rounds)
	}
	outcome := fmt.Sprintf("would complete: total ~%s, %s, downtime ~%s", formatMS(e.Total), rounds, formatMS(e.Downtime))
	if !e.Converges {
		outcome = "would not converge: " + e.Note
	}
	_, err := fmt.Fprintf(out, "%s\n%s of %s have content; the link carries %s/s, the guest writes %s/s (over %s)\n", outcome, units.Bytes(e.DataBytes),
		units.Bytes(e.RAMBytes), units.Bytes(e.BandwidthBytes), units.Bytes(e.DirtyRate.BytesPerSecond), formatMS(e.DirtyRate.Interval))
	return err
}
