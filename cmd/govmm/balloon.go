package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/units"
	"github.com/spf13/cobra"
)

func newBalloon() *cobra.Command {
	flags := guestFlags()
	var target sizeFlag
	cmd := &cobra.Command{
		Use:   "balloon [NAME]",
		Short: "Take memory from a guest or give it back, or show its memory statistics",
		Long: `Without --target: show how much memory the VM's balloon holds, and the statistics
that the guest gives of its memory.

--target SIZE sets how much of the guest's memory the balloon is to hold; the host
can use that memory. 64M takes 64 MiB from the guest, 0 gives all back. The guest
follows in its own time, or never if it has no driver for the balloon. The command
does not wait: it prints how much the balloon holds now.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			c, err := flags.client(ctx, args)
			if err != nil {
				return fmt.Errorf("%s: %w", tried(cmd, args), err)
			}
			var b balloon.Info
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
	cmd.Flags().Var(&target, "target", "how much of the guest's memory the balloon is to hold, as in 64M; 0 gives all back")
	return cmd
}

func printBalloon(out io.Writer, b balloon.Info) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(key, value string) { _, _ = fmt.Fprintf(w, "%s\t%s\n", key, value) }
	row("target", units.Bytes(b.Target))
	row("actual", units.Bytes(b.Actual))
	if b.Stats == nil {
		row("statistics", "the guest has not given any")
		return w.Flush()
	}
	for _, l := range b.Stats.Rows() {
		row(l[0], l[1])
	}
	row("as of", b.Stats.At.Local().Format("15:04:05"))
	return w.Flush()
}
