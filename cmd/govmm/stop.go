package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

func newStop() *cobra.Command {
	var flags clientFlags
	var force, thenForce bool
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "stop [NAME]",
		Short: "Ask a guest to power off, or end the VM at once (--force)",
		Long: `Press the guest's power button and wait until it has powered off.

The command fails, and the guest goes on, if the guest does not listen to its
button (the demo guest, a kernel without ACPI, one that is still starting) or is
paused. It also fails when --timeout has passed: the guest was asked then, and may
still power off. In each of these cases --then-force ends the VM, as pulling the
plug would; --force does so at once, and does not ask the guest. A receiver that
waits for its guest ends at once.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			if wait <= 0 {
				return usagef(cmd, "--timeout %v: must be more than 0", wait)
			}
			if force && thenForce {
				return usagef(cmd, "--force and --then-force exclude each other")
			}
			return flags.act(cmd, args, "is stopped", func(ctx context.Context, c *api.Client) (api.Info, error) {
				info, err := api.Info{}, error(nil)
				if force {
					info, err = c.Stop(ctx)
				} else {
					stop := newProgressLine(cmd.ErrOrStderr(), "auto").during(waiting("waiting until the guest has powered off"))
					info, err = powerOff(ctx, c, wait)
					stop()
				}
				if err != nil && thenForce && ctx.Err() == nil && info.State != vmm.StateMigrated && !errors.Is(err, api.ErrNotRunning) {
					_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "govmm: %s: %s; it is ended now\n", tried(cmd, args), strings.TrimSuffix(err.Error(), "; --force ends it at once"))
					info, err = c.Stop(ctx)
				}
				if err == nil {
					err = c.WaitGone(ctx)
				}
				return info, err
			})
		},
	}
	flags.register(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "do not ask the guest: end it at once")
	cmd.Flags().BoolVar(&thenForce, "then-force", false, "end it if it does not listen to its button, or has not powered off in time")
	cmd.Flags().DurationVar(&wait, "timeout", time.Minute, "how long to wait for the guest to power off (`TIME`)")
	return cmd
}

// powerOff presses the power button and returns when the guest has powered off.
func powerOff(ctx context.Context, c *api.Client, wait time.Duration) (api.Info, error) {
	info, err := c.PowerOff(ctx, wait)
	switch {
	case errors.Is(err, vmm.ErrState):
		return info, fmt.Errorf("%w; --force ends it at once", err)
	case err != nil:
		return info, err
	case info.State == vmm.StateMigrated:
		return info, fmt.Errorf("the guest has moved away meanwhile; it was asked to power off, and does so there")
	case info.State != vmm.StateStopped:
		return info, fmt.Errorf("the guest has not powered off within %v; it was asked to, and may still do so; --force ends it at once", wait)
	}
	return info, nil
}
