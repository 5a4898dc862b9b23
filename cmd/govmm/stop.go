package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/govmm/govmm/vmm/api"
)

func newStop() *cobra.Command {
	var flags clientFlags
	cmd := &cobra.Command{
		Use:   "stop [NAME]",
		Short: "End a VM at once, as pulling the plug would",
		Args:  oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			return flags.act(cmd, args, "is stopped", func(ctx context.Context, c *api.Client) (api.Info, error) {
				info, err := c.Stop(ctx)
				if err == nil {
					err = c.WaitGone(ctx)
				}
				return info, err
			})
		},
	}
	flags.register(cmd)
	return cmd
}
