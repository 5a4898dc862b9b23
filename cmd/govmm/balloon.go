package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/vmm/api"
)

func newBalloon() *cobra.Command {
	flags := clientFlags{passOver: []string{receiving}}
	var target sizeFlag
	cmd := &cobra.Command{
		Use:   "balloon [NAME]",
		Short: "Take memory from a guest and give it back, or show how it is doing",
		Long: `Without --target: show what the VM's memory balloon holds, and the statistics
that the guest gives of its memory.

--target SIZE says how much of its memory the guest shall give up: the balloon
holds so much, and the host has it. 64M takes 64 MiB from the guest, 0 gives all
back. The guest follows in its own time, or never if it has no driver for its
balloon; what is printed is how far it is.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			c, err := flags.client(ctx, args)
			if err != nil {
				return fmt.Errorf("%s: %w", tried(cmd, args), err)
			}
			var b api.Balloon
			if cmd.Flags().Changed("target") {
				b, err = c.SetBalloon(ctx, uint64(target))
			} else {
				b, err = c.Balloon(ctx)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", tried(cmd, args), advise(err))
			}
			if flags.json {
				return printJSON(cmd.OutOrStdout(), b)
			}
			return printBalloon(cmd.OutOrStdout(), b)
		},
	}
	flags.register(cmd)
	cmd.Flags().Var(&target, "target", "what the balloon shall hold of the guest's memory: as in 64M, 0 gives all back")
	return cmd
}

func printBalloon(out io.Writer, b api.Balloon) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(key, value string) { _, _ = fmt.Fprintf(w, "%s\t%s\n", key, value) }
	row("target", formatBytes(b.Target))
	row("actual", formatBytes(b.Actual))
	if b.Stats == nil {
		row("statistics", "none: the guest gives none, or has not yet")
		return w.Flush()
	}
	for _, l := range statLines(b.Stats) {
		row(l[0], l[1])
	}
	row("as of", b.Stats.At.Local().Format("15:04:05"))
	return w.Flush()
}

// statLines are those statistics that the guest gives, in words.
func statLines(s *balloon.Stats) (lines [][2]string) {
	for _, l := range []struct {
		name  string
		value *uint64
		count bool // not bytes
	}{
		{"total", s.Total, false},
		{"available", s.Available, false},
		{"free", s.Free, false},
		{"disk caches", s.DiskCaches, false},
		{"swapped in", s.SwapIn, false},
		{"swapped out", s.SwapOut, false},
		{"major faults", s.MajorFaults, true},
		{"minor faults", s.MinorFaults, true},
		{"huge pages", s.HugetlbAllocs, true},
		{"huge pages failed", s.HugetlbFailures, true},
	} {
		switch {
		case l.value == nil:
		case l.count:
			lines = append(lines, [2]string{l.name, fmt.Sprint(*l.value)})
		default:
			lines = append(lines, [2]string{l.name, formatBytes(*l.value)})
		}
	}
	return lines
}
