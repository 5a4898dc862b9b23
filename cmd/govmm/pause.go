package main

import (
	"context"

	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

func newPause() *cobra.Command {
	flags := guestFlags()
	cmd := &cobra.Command{
		Use:   "pause [NAME]",
		Short: "Stop a VM's vCPUs until it is resumed",
		Args:  oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			return flags.act(cmd, args, "is paused", func(ctx context.Context, c *api.Client) (api.Info, error) {
				return c.Pause(ctx)
			})
		},
	}
	flags.register(cmd)
	return cmd
}
