package main

import (
	"fmt"
	"strings"

	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

// newRoot makes the command of this command line, args, or all if it is none of them.
func newRoot(args []string) *cobra.Command {
	root := &cobra.Command{
		Use:   "govmm",
		Short: "Run virtual machines on KVM, and move them while they run",
		Long: `govmm runs virtual machines on KVM, and moves them to another process or host
while they run.

  govmm run                               a terminal for the embedded demo guest
  govmm receive --listen 127.0.0.1:7000   wait for a guest (from other hosts: govmm certs --help)
  govmm migrate --to 127.0.0.1:7000       move it there`,
		Version:           version(),
		SilenceUsage:      true,
		SilenceErrors:     true,
		Args:              cobra.ArbitraryArgs,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				cmd.SetOut(cmd.ErrOrStderr())
				_ = cmd.Help()
				return &usageError{}
			}
			if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
				return usagef(cmd, "unknown command %q; did you mean %s?", args[0], strings.Join(like, " or "))
			}
			return usagef(cmd, "unknown command %q; see govmm --help", args[0])
		},
	}
	root.SuggestionsMinimumDistance = 2
	root.SetVersionTemplate("govmm {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef(cmd, "%v; see %s --help", err, cmd.CommandPath())
	})
	for _, c := range commands {
		if len(args) > 0 && args[0] == c.name {
			root.AddCommand(c.make()) // a process of a VM lives long and needs no other
			return root
		}
	}
	for _, c := range commands {
		root.AddCommand(c.make())
	}
	return root
}

// commands are all, in the order of the help.
var commands = []struct {
	name string
	make func() *cobra.Command
}{
	{"run", newRun}, {"receive", newReceive}, {"migrate", newMigrate}, {"upgrade", newUpgrade}, {"migrations", newMigrations}, {"report", newReport}, {"events", newEvents}, {"console", newConsole}, {"snapshot", newSnapshot}, {"dirty-rate", newDirtyRate}, {"ps", newPS}, {"top", newTop}, {"info", newInfo},
	{"pause", newPause}, {"resume", newResume}, {"stop", newStop}, {"balloon", newBalloon}, {"config", newConfig}, {"image", newImage}, {"certs", newCerts}, {"demo", newDemo}, {"version", newVersion},
	{"completion", newCompletion},
}

// usagef makes the error of a command line that makes no sense: the command, why it
// does not work, what to do.
func usagef(cmd *cobra.Command, format string, args ...any) error {
	msg := fmt.Sprintf(format, args...)
	if cmd.HasParent() {
		msg = cmd.Name() + ": " + msg
	}
	return &usageError{msg}
}

// oneName accepts one argument, a VM's NAME, or none.
func oneName(cmd *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usagef(cmd, "expected one NAME, found %d arguments; see %s --help", len(args), cmd.CommandPath())
	}
	if len(args) == 1 {
		if err := api.ValidateName(args[0]); err != nil {
			return usagef(cmd, "%v", err)
		}
	}
	return nil
}

// noArgs accepts no argument.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef(cmd, "expected no argument, found %q; see %s --help", args[0], cmd.CommandPath())
	}
	return nil
}

// nameOf returns the NAME argument, or an empty string.
func nameOf(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

// tried is a command and its VM's name, for the beginning of an error.
func tried(cmd *cobra.Command, args []string) string {
	return strings.Join(append([]string{cmd.Name()}, args...), " ")
}
