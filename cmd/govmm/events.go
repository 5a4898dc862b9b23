package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/vmm"
	"github.com/spf13/cobra"
)

func newEvents() *cobra.Command {
	var flags clientFlags
	var after uint64
	var follow bool
	cmd := &cobra.Command{
		Use:   "events [NAME]",
		Short: "Show what has happened to a VM",
		Long: `Show what has happened to a VM: states, resets, panics, errors of disks, and the phases and rounds
of its migrations. The last 256 events are kept. Each has a number; --after shows only those that
follow it, and says how many of them are lost. With --follow the command goes on until the VM ends.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := flags.client(cmd.Context(), args)
			if err != nil {
				return fmt.Errorf("%s: %w", tried(cmd, args), err)
			}
			out := cmd.OutOrStdout()
			err = c.Events(cmd.Context(), after, follow, func(e vmm.Event) error {
				if flags.json {
					return printJSON(out, e)
				}
				return printEvent(out, e)
			})
			if err != nil {
				return fmt.Errorf("%s: %w", tried(cmd, args), advise(err))
			}
			return nil
		},
	}
	flags.register(cmd)
	cmd.Flags().Lookup("json").Usage = "print one JSON object a line"
	cmd.Flags().Uint64Var(&after, "after", 0, "only those after the event with the number `N`")
	cmd.Flags().BoolVar(&follow, "follow", false, "go on until the VM ends")
	return cmd
}

// printEvent prints an event in a line.
func printEvent(out io.Writer, e vmm.Event) error {
	words := []string{fmt.Sprintf("%d %s %s", e.Seq, e.Time.Local().Format("15:04:05.000"), e.Type)}
	add := func(format string, args ...any) { words = append(words, fmt.Sprintf(format, args...)) }
	if e.State != "" {
		add("%s", e.State)
	}
	if e.Was != "" {
		add("(was %s)", e.Was)
	}
	if e.Device != "" {
		add("%s", quoted(e.Device))
	}
	if e.Migration != "" {
		add("%s", e.Migration)
	}
	if e.Address != "" {
		add("%s", quoted(e.Address))
	}
	if e.Phase != "" {
		add("%s", e.Phase)
	}
	if e.Reason != "" {
		add("%s", e.Reason)
	}
	if r := e.Round; r != nil {
		add("%d: %v, %s sent, %d pages of %d", r.N, r.Duration.Round(time.Millisecond), units.Bytes(r.BytesSent), r.PagesSent, r.DirtyPages)
	}
	if e.Message != "" {
		add("%s", quoted(e.Message))
	}
	if e.More != 0 {
		add("and %d more", e.More)
	}
	if e.Lost != 0 {
		add("%d events", e.Lost)
	}
	_, err := fmt.Fprintln(out, strings.Join(words, " "))
	return err
}
