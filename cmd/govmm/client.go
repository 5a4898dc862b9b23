package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/govmm/govmm/vmm/api"
)

// clientFlags are those of every command that talks to a VM.
type clientFlags struct {
	socket string
	json   bool
	// passOver are states of VMs that cannot be meant when no NAME is given.
	passOver []string
}

// receiving is the state of a VM without a guest: nothing to pause or migrate.
const receiving = "receiving"

func (f *clientFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.socket, "api-socket", "", "pick the VM by the `PATH` of its API socket")
	cmd.Flags().BoolVar(&f.json, "json", false, "print one JSON object")
	cmd.ValidArgsFunction = completeNames
}

// client finds the VM that the command is about.
func (f *clientFlags) client(ctx context.Context, args []string) (*api.Client, error) {
	if f.socket == "" {
		c, err := api.Find(ctx, api.Directory(), nameOf(args), f.passOver...)
		return c, advise(err)
	}
	c := api.Open(f.socket)
	if name := nameOf(args); name != "" {
		info, err := c.Info(ctx)
		if err != nil {
			return nil, advise(err)
		}
		if info.Name != name {
			return nil, fmt.Errorf("the VM at %s is named %q; leave the NAME out, or give that one", f.socket, info.Name)
		}
	}
	return c, nil
}

// act runs a command that asks one thing of a VM and prints what the VM is
// then.
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

// advise adds to an error what to do about it.
func advise(err error) error {
	switch {
	case errors.Is(err, api.ErrNotRunning):
		return fmt.Errorf("%w; see govmm ps, or start one with govmm run", err)
	case errors.Is(err, api.ErrAmbiguous):
		return fmt.Errorf("%w; give one's NAME", err)
	case errors.Is(err, api.ErrNoAnswer):
		return fmt.Errorf("%w; it may be stopped or hang", err)
	}
	return err
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// completeNames offers the names of the VMs that run to the shell.
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
