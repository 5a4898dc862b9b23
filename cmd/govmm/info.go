package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

func newInfo() *cobra.Command {
	var flags clientFlags
	cmd := &cobra.Command{
		Use:   "info [NAME]",
		Short: "Describe a VM",
		Args:  oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := flags.client(cmd.Context(), args)
			if err != nil {
				return fmt.Errorf("%s: %w", tried(cmd, args), err)
			}
			info, err := c.Info(cmd.Context())
			if err != nil {
				return fmt.Errorf("%s: %w", tried(cmd, args), advise(err))
			}
			for i, d := range info.Devices {
				if _, ok := d.Info.(*balloon.Info); !ok {
					continue
				}
				// With the guest's statistics as they are now, if it gives any.
				if b, err := c.Balloon(cmd.Context()); err == nil {
					info.Devices[i].Info = &b
				}
			}
			if flags.json {
				return printJSON(cmd.OutOrStdout(), info)
			}
			return printInfo(cmd.OutOrStdout(), info)
		},
	}
	flags.register(cmd)
	return cmd
}

func printInfo(out io.Writer, info api.Info) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(key, format string, args ...any) { _, _ = fmt.Fprintf(w, key+"\t"+format+"\n", args...) }
	row("name", "%s", info.Name)
	row("state", "%s", info.State)
	if info.Panicked && info.State != vmm.StatePanicked {
		row("", "the guest's kernel has panicked")
	}
	if info.Kernel != "" {
		row("kernel", "%s", info.Kernel)
	}
	row("cpus", "%s", cpusText(info.CPUs))
	row("memory", "%s", memoryText(info.Memory))
	row("pid", "%d", info.PID)
	row("api socket", "%s", info.Socket)
	row("sandbox", "%s", info.Sandbox)
	for _, d := range info.Devices {
		lines := []string{d.Kind.About}
		if d.Info != nil {
			lines = d.Info.Lines()
		}
		key := d.Kind.Name
		for _, l := range lines {
			row(key, "%s", l)
			key = ""
		}
	}
	if info.Address != "" {
		row("address", "%s", info.Address)
	}
	if in := info.Incoming; in != nil && in.Active {
		row("incoming", "%s from %s", units.Bytes(in.BytesReceived), in.Peer)
	}
	if p := info.Migration; p != nil {
		row("migration", "%s", migrationText(p))
		if p.Phase == migrate.PhasePrecopy {
			row("", "%s", progressText(*p))
		}
		if p.Error != "" {
			row("", "%s", p.Error)
		}
	}
	return w.Flush()
}
