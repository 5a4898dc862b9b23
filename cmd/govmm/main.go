// Command govmm runs virtual machines on KVM and moves them to another process
// or host while they run. docs/cli.md describes its commands.
//
// A command here reads its flags, calls vmm (run, receive) or vmm/api (all
// others), and prints. What the user asked for goes to stdout, everything else to
// stderr; an error is one line. Exit status: 0 done, 1 failed, 2 usage; govmm migrate
// has more of them.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/govmm/govmm/vmm/serial"
)

// Exit statuses.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2

	// Of govmm migrate: the guest goes on at the source, except after exitUnknown.
	exitRefused   = 3 // the destination does not take the guest
	exitBefore    = 4 // it failed while the guest ran
	exitInStop    = 5 // it failed while the guest stood still
	exitCancelled = 6
	exitUnknown   = 7 // it is not known who runs the guest, or how the migration ended
)

// exitError is an error with an exit status of its own.
type exitError struct {
	error
	status int
}

func (e *exitError) Unwrap() error { return e.error }

func main() {
	if len(os.Args) == 2 && os.Args[1] == watchTerminal {
		if serial.WatchTerminal() != nil {
			os.Exit(exitFailed)
		}
		os.Exit(exitDone)
	}
	if len(os.Args) > 1 && os.Args[1] == takeOver {
		os.Exit(takeOverMain(os.Args[2:], os.Stdout))
	}
	if len(os.Args) == 3 {
		if run := processes[os.Args[1]]; run != nil {
			os.Exit(run(os.Args[2], os.Stderr))
		}
	}
	if len(os.Args) == 2 && os.Args[1] == readDisk {
		os.Exit(serveDisk())
	}
	os.Exit(govmm(os.Args[1:], os.Stdout, os.Stderr))
}

// watchTerminal is the argument of the process that restores the terminal of a VM's
// process which cannot do so itself.
const watchTerminal = "__watch-terminal"

// govmm runs one command line and returns the exit status.
func govmm(args []string, stdout, stderr io.Writer) int {
	root := newRoot(args)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if err == nil {
		return exitDone
	}
	var usage *usageError
	isUsage := errors.As(err, &usage)
	if other := (*statusError)(nil); errors.As(err, &other) {
		return other.status
	}
	if text := err.Error(); text != "" {
		_, _ = fmt.Fprintln(stderr, "govmm: "+strings.ReplaceAll(strings.TrimSpace(text), "\n", "; "))
	}
	if isUsage {
		return exitUsage
	}
	if with := (*exitError)(nil); errors.As(err, &with) {
		return with.status
	}
	return exitFailed
}

// usageError is a command line that makes no sense.
type usageError struct{ msg string }

func (e *usageError) Error() string { return e.msg }
