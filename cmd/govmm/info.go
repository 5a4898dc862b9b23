package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/api"
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
			if info.Devices != nil && info.Devices.Balloon != nil {
				// The guest's statistics as they are now, if it gives any.
				if b, err := c.Balloon(cmd.Context()); err == nil {
					info.Devices.Balloon = &b
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
	if info.Panicked && info.State != "panicked" {
		row("", "the guest's kernel has panicked")
	}
	if info.Kernel != "" {
		row("kernel", "%s", info.Kernel)
	}
	row("cpus", "%s", cpusText(info.CPUs))
	row("memory", "%s", memoryText(info.Memory))
	row("pid", "%d", info.PID)
	row("api socket", "%s", info.Socket)
	if info.Devices != nil {
		infoDevices(info.Devices, row)
	}
	if info.Address != "" {
		row("address", "%s", info.Address)
	}
	if in := info.Incoming; in != nil && in.Active {
		row("incoming", "%s from %s", formatBytes(in.BytesReceived), in.Peer)
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

// infoDevices prints a row or more a device, in the order of their slots.
func infoDevices(d *api.Devices, row func(key, format string, args ...any)) {
	if b := d.Balloon; b != nil {
		row("balloon", "holds %s, of %s that it shall", formatBytes(b.Actual), formatBytes(b.Target))
		if b.Stats != nil {
			var stats []string
			for _, l := range statLines(b.Stats) {
				stats = append(stats, l[0]+" "+l[1])
			}
			row("", "the guest: %s", strings.Join(stats, ", "))
		}
	}
	if d.RNG {
		row("rng", "entropy device")
	}
	if d.Console {
		row("console", "hvc0")
	}
	for _, k := range d.Disks {
		how := ""
		for _, o := range []struct {
			is   bool
			text string
		}{{k.ReadOnly, "read-only"}, {k.Direct, "direct"}, {k.ID != "", "id " + k.ID}, {k.Queues > 1, fmt.Sprintf("%d queues", k.Queues)}} {
			if o.is {
				how += ", " + o.text
			}
		}
		row("disk", "%s, %s%s", k.Path, formatBytes(k.Size), how)
		row("", "read %s, wrote %s, %d errors", formatBytes(k.ReadBytes), formatBytes(k.WrittenBytes), k.Errors)
	}
	for _, n := range d.Nets {
		how := ""
		if n.Bridge != "" {
			how = ", bridge " + n.Bridge
		}
		row("net", "%s, tap %s%s", n.MAC, n.Tap, how)
		row("", "received %d frames (%s), sent %d (%s), dropped %d and %d", n.RxFrames, formatBytes(n.RxBytes), n.TxFrames, formatBytes(n.TxBytes),
			n.RxDropped, n.TxDropped)
	}
	if v := d.Vsock; v != nil {
		row("vsock", "cid %d, %s", v.CID, v.Path)
	}
}
