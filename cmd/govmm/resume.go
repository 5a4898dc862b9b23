package main

import (
	"context"

	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

func newResume() *cobra.Command {
	flags := guestFlags()
	var force bool
	cmd := &cobra.Command{
		Use:   "resume [NAME]",
		Short: "Let a paused VM go on",
		Long: `Let a paused VM go on.

A VM whose state is handoff-unknown has been handed over to another host, and the
connection broke before the answer: it is not known whether the guest runs there.
govmm goes on asking, and the VM stays paused until there is an answer. --force
lets it go on here without one. If the guest runs at the destination too, it then
runs twice, and what both write to (disks, network addresses) is damaged. Make
sure that the destination's govmm has ended, or that its host is off, before you
use it.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			return flags.act(cmd, args, "runs", func(ctx context.Context, c *api.Client) (api.Info, error) {
				return c.Resume(ctx, force)
			})
		},
	}
	flags.register(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "resume although the guest may run at a migration's destination (see above)")
	return cmd
}
