package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

func newPS() *cobra.Command {
	var flags clientFlags
	var watch watchFlags
	cmd := &cobra.Command{
		Use:   "ps [NAME]",
		Short: "List the VMs that run",
		Long: `List the VMs that run.

A VM that was started with --api-socket is not in the list; --api-socket PATH shows
it. With --watch the list is shown again and again: on a terminal in place, until q or Ctrl-C.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := watch.check(cmd); err != nil {
				return err
			}
			if watch.on {
				if err := watch.run(cmd, &flags, args); err != nil {
					return fmt.Errorf("%s: %w", tried(cmd, args), err)
				}
				return nil
			}
			infos, err := flags.list(cmd.Context(), args)
			if infos != nil {
				show := printPS
				if flags.json {
					show = func(w io.Writer, infos []api.Info) error { return printJSON(w, infos) }
				}
				if err := show(cmd.OutOrStdout(), infos); err != nil {
					return err
				}
			}
			if err != nil {
				return fmt.Errorf("%s: %w", tried(cmd, args), err)
			}
			return nil
		},
	}
	flags.register(cmd)
	cmd.Flags().Lookup("json").Usage = "print one JSON array"
	watch.register(cmd)
	return cmd
}

// list describes the VMs that the command names. It may return both: those that
// answer, and an error about those that do not.
func (f *clientFlags) list(ctx context.Context, args []string) ([]api.Info, error) {
	if f.socket != "" || len(args) > 0 {
		c, err := f.client(ctx, args)
		if err != nil {
			return nil, err
		}
		info, err := c.Info(ctx)
		if err != nil {
			return nil, advise(err)
		}
		return []api.Info{info}, nil
	}
	entries, err := api.List(ctx, api.Directory())
	if err != nil {
		return nil, err
	}
	infos, silent := []api.Info{}, []error{}
	for _, e := range entries {
		if e.Err != nil {
			silent = append(silent, fmt.Errorf("%s: %w", e.Name, e.Err))
			continue
		}
		infos = append(infos, e.Info)
	}
	return infos, advise(errors.Join(silent...))
}

func printPS(out io.Writer, infos []api.Info) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "NAME\tSTATE\tCPUS\tMEMORY\tPID\tMIGRATION")
	for _, i := range infos {
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n", plain(i.Name), plain(string(i.State)), cpusText(i.CPUs), memoryText(i.Memory), i.PID, plain(psMigration(i)))
	}
	return w.Flush()
}

// psMigration describes a VM's migration in a few words.
func psMigration(i api.Info) string {
	switch {
	case i.Migration != nil:
		return migrationText(i.Migration)
	case i.Incoming != nil && i.Incoming.Active:
		return fmt.Sprintf("from %s, %s", i.Incoming.Peer, units.Bytes(i.Incoming.BytesReceived))
	case i.Address != "" && i.State == vmm.StateReceiving:
		return "listening on " + i.Address
	}
	return "-"
}

func migrationText(p *migrate.Progress) string {
	s := fmt.Sprintf("%s, to %s", p.Phase, p.Address)
	if p.Phase == migrate.PhasePrecopy {
		s += fmt.Sprintf(", round %d", p.Round)
	}
	return s
}

// cpusText and memoryText return a dash for what a receiver does not know yet.
func cpusText(n int) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(n)
}

func memoryText(n uint64) string {
	if n == 0 {
		return "-"
	}
	return formatSize(n)
}
