package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/govmm/govmm/vmm/api"
)

func newResume() *cobra.Command {
	flags := clientFlags{passOver: []string{receiving}}
	var force bool
	cmd := &cobra.Command{
		Use:   "resume [NAME]",
		Short: "Let a paused VM go on",
		Long: `Let a paused VM go on.

A VM whose state is handoff-unknown has been offered to another host, and whether
it runs there is not known: the connection broke before the answer. govmm keeps
asking, and the VM stays paused until it knows. --force lets it go on here
regardless. If it runs at the destination too, it then runs twice, and what both
write (disks, network addresses) is damaged. Make sure that the destination's
govmm is gone, or its host off, before using it.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			return flags.act(cmd, args, "runs", func(ctx context.Context, c *api.Client) (api.Info, error) {
				return c.Resume(ctx, force)
			})
		},
	}
	flags.register(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "resume although the guest may run at the destination of a migration (see above)")
	return cmd
}
