package main

import (
	"errors"
	"io"
	"time"

	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

// watchFlags show a list again and again.
type watchFlags struct {
	on       bool
	interval time.Duration
	count    int
}

func (w *watchFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.BoolVar(&w.on, "watch", false, "show the list again and again")
	flags.DurationVar(&w.interval, "interval", 2*time.Second, "`TIME` between two lists of --watch")
	flags.IntVar(&w.count, "count", 0, "`N` lists of --watch; 0: on a terminal the screen, otherwise lists without end")
}

func (w *watchFlags) check(cmd *cobra.Command) error {
	switch {
	case !w.on && (cmd.Flags().Changed("interval") || cmd.Flags().Changed("count")):
		return usagef(cmd, "--interval and --count need --watch")
	case w.interval < minWatch || w.interval > maxWatch:
		return usagef(cmd, "--interval %v: must be between %v and %v", w.interval, minWatch, maxWatch)
	case w.count < 0:
		return usagef(cmd, "--count %d: must not be negative", w.count)
	}
	return nil
}

func (w *watchFlags) run(cmd *cobra.Command, flags *clientFlags, args []string) error {
	ctx := cmd.Context()
	list := allVMs
	if flags.socket != "" || len(args) > 0 {
		c, err := flags.client(ctx, args)
		if err != nil {
			return err
		}
		name := nameOf(args)
		if name == "" {
			info, err := c.Info(ctx)
			if err != nil {
				return advise(err)
			}
			name = info.Name
		}
		list = func() ([]api.Entry, error) { return []api.Entry{{Name: name, Client: c}}, nil }
	}
	poll, fleet := newPoller(list), newFleet("name")
	if terminal := wholeTerminal(cmd); terminal != nil && !flags.json && w.count == 0 {
		return watchScreen(ctx, terminal, &topView{title: "govmm ps", columns: psColumns, fleet: fleet, interval: w.interval}, poll)
	}
	out := cmd.OutOrStdout()
	for n := 1; ; n++ {
		if err := poll.gather(ctx, fleet, answerTime); err != nil {
			return err
		}
		if err := printLists(out, fleet, flags.json); err != nil || n == w.count {
			return err
		}
		select {
		case <-time.After(w.interval):
		case <-ctx.Done():
			return nil
		}
	}
}

// printLists prints what ps prints, or with JSON a line of it. Who does not answer has a row
// as well.
func printLists(out io.Writer, f *fleet, asJSON bool) error {
	infos := []api.Info{}
	for _, r := range f.sorted() {
		info := r.info
		info.Name, info.State = r.name, r.state
		infos = append(infos, info)
	}
	if asJSON {
		return printJSON(out, infos)
	}
	err := printPS(out, infos)
	_, err2 := io.WriteString(out, "\n")
	return errors.Join(err, err2)
}
