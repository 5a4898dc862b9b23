package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

// clientFlags are the flags of every command that talks to a VM.
type clientFlags struct {
	socket string
	json   bool
	// skip are states of VMs that are not meant when no NAME is given.
	skip []vmm.State
}

// guestFlags are clientFlags of a command that needs a guest: a receiver that
// waits for one is not meant.
func guestFlags() clientFlags { return clientFlags{skip: []vmm.State{vmm.StateReceiving}} }

func (f *clientFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.socket, "api-socket", "", "pick the VM by the `PATH` of its API socket")
	cmd.Flags().BoolVar(&f.json, "json", false, "print one JSON object")
	cmd.ValidArgsFunction = completeNames
}

// client returns a client for the VM that the command names.
func (f *clientFlags) client(ctx context.Context, args []string) (*api.Client, error) {
	if f.socket == "" {
		c, err := api.Find(ctx, api.Directory(), nameOf(args), f.skip...)
		return c, advise(err)
	}
	c := api.Open(f.socket)
	if name := nameOf(args); name != "" {
		info, err := c.Info(ctx)
		if err != nil {
			return nil, advise(err)
		}
		if info.Name != name {
			return nil, fmt.Errorf("%s: expected the VM %q, found %q; omit the NAME, or give that one", f.socket, name, info.Name)
		}
	}
	return c, nil
}

// act runs a command that does one thing to a VM, and prints the VM's state
// afterwards.
func (f *clientFlags) act(cmd *cobra.Command, args []string, done string, do func(context.Context, *api.Client) (api.Info, error)) error {
	ctx := cmd.Context()
	c, err := f.client(ctx, args)
	if err != nil {
		return fmt.Errorf("%s: %w", tried(cmd, args), err)
	}
	info, err := do(ctx, c)
	if err != nil {
		return fmt.Errorf("%s: %w", tried(cmd, args), advise(err))
	}
	if f.json {
		return printJSON(cmd.OutOrStdout(), info)
	}
	_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "govmm: %s %s\n", info.Name, done)
	return nil
}

// forceAdvice is what helps a guest whose destination does not answer any more.
const forceAdvice = "use govmm resume --force: should the guest run there too, it then runs twice and damages what it writes to"

// advise adds to an error what to do about it.
func advise(err error) error {
	switch {
	case errors.Is(err, api.ErrNotRunning):
		return fmt.Errorf("%w; see govmm ps, or start one with govmm run", err)
	case errors.Is(err, api.ErrAmbiguous):
		return fmt.Errorf("%w; give the NAME of one", err)
	case errors.Is(err, api.ErrNoAnswer):
		return fmt.Errorf("%w; it may be stopped (SIGSTOP) or hang", err)
	case errors.Is(err, vmm.ErrMayRunElsewhere):
		return fmt.Errorf("%w; if the destination is gone for good, %s", err, forceAdvice)
	case errors.Is(err, vmm.ErrNoBalloon):
		return fmt.Errorf("%w (govmm run --balloon gives it one)", err)
	}
	return err
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// completeNames completes the name of a VM that runs.
func completeNames(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	entries, err := api.List(ctx, api.Directory())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
