// Package sandbox takes from this process what a virtual machine's process does not
// need: capabilities, most files, most of the network, and most system calls. What a
// guest or a peer makes of a fault in the VMM is then bounded by what is left, see
// docs/security.md.
//
// The cage is the whole process's and cannot be left, so no other package of this
// module enters it: a program that embeds a VM decides itself. The order is: open
// everything, start every other process, take locks, then [Policy.Enter], then let the
// guest run or the peer connect. Threads that run vCPUs call [NarrowVCPU] besides.
package sandbox

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Mode says what happens to a system call that is not allowed.
type Mode string

// The modes.
const (
	// On ends the process with one line on stderr that names the system call.
	On Mode = "on"
	// Auto is On, without Landlock or seccomp where the host does not give them.
	Auto Mode = "auto"
	// Log reports the system call and lets it through. It is for finding out what
	// a configuration needs: only system calls are looked at, nothing is restricted.
	Log Mode = "log"
	// Off restricts nothing.
	Off Mode = "off"
)

// ParseMode reads a mode.
func ParseMode(s string) (Mode, error) {
	if m := Mode(s); slices.Contains([]Mode{Auto, On, Off, Log}, m) {
		return m, nil
	}
	return "", fmt.Errorf("%.80q: expected auto, on, off or log", s)
}

// Policy is what a process may use once it is in the cage, beside what it holds open.
// Paths that do not exist are left out.
type Policy struct {
	Mode Mode
	// Read are files, and directories with all below them, that may be opened for
	// reading; Write are files and devices that may also be opened for writing.
	Read, Write []string
	// Replace are directories in which files may be made, opened for writing, renamed
	// and removed. Sockets in them may be made too, if Listen is set.
	Replace []string
	// Remove are directories in which files may be removed.
	Remove []string
	// AllFiles leaves all files to the process, as far as its user may use them.
	AllFiles bool
	// Listen lets the process make listening unix sockets.
	Listen bool
	// Netlink lets the process ask the kernel about network interfaces.
	Netlink bool
	// Missing lets the process have guest memory that comes later (userfaultfd).
	Missing bool
	// Ports are the TCP ports that the process may connect to; nil: all.
	Ports []uint16
	// Bind are the TCP ports that the process may bind.
	Bind []uint16
	// Network makes the process one of a network: instead of the system calls of a VM's it
	// may make those of sockets of IPv4 and IPv6, and it opens no file.
	Network bool
	// Kill lets the process end those that it has started and has a descriptor of.
	Kill bool
	// Keep are capabilities that the process keeps if it has them, as unix.CAP_NET_ADMIN.
	Keep []int
	// Report is called in mode Log for what would end the process in mode On, once for
	// each system call and kind of argument, from a goroutine of the package.
	Report func(string) `json:"-"`
}

// Status is what is in force. Its zero value is that of a process that is not in a cage.
type Status struct {
	Mode Mode `json:"mode"`
	// Landlock is the version of the kernel's interface that is used; 0: it is not.
	Landlock int `json:"landlock"`
	// Seccomp says that system calls are filtered.
	Seccomp bool `json:"seccomp"`
	// Capabilities are those that the process has kept; nil: all of its user's.
	Capabilities []string `json:"capabilities,omitzero"`
	// Missing lists what the host does not give: its kernel, or who started the process.
	Missing []string `json:"missing,omitempty"`
}

// String describes it in a line.
func (s Status) String() string {
	if s.Mode == "" || s.Mode == Off {
		return string(Off)
	}
	words := []string{string(s.Mode)}
	if s.Landlock > 0 {
		words = append(words, fmt.Sprintf("Landlock %d", s.Landlock))
	}
	if s.Seccomp {
		words = append(words, "seccomp")
	}
	switch {
	case s.Mode == Log:
	case len(s.Capabilities) == 0:
		words = append(words, "no capabilities")
	default:
		words = append(words, "capabilities "+strings.Join(s.Capabilities, " "))
	}
	if s.Missing != nil {
		words = append(words, "missing: "+strings.Join(s.Missing, "; "))
	}
	return strings.Join(words, ", ")
}

// current is the status of this process; nil: it is in no cage.
var current atomic.Pointer[Status]

// Current returns what is in force in this process.
func Current() Status {
	if s := current.Load(); s != nil {
		return *s
	}
	return Status{Mode: Off}
}

// ErrEntered: the process is in a cage already.
var ErrEntered = errors.New("the process is in the sandbox already")

// ErrNotGiven: the host does not give Landlock or seccomp, without which there is no [On].
var ErrNotGiven = errors.New("the host does not give it")

// Enter puts all threads of this process into the cage, and with them those that are
// started later. A newer version of Landlock that the kernel lacks is left out and listed in
// the status; so are, in mode Auto, Landlock and seccomp, and in mode On their lack is
// ErrNotGiven. After an
// error the cage may be there in part, and the process should end. Enter is called once.
func (p Policy) Enter() (Status, error) {
	if p.Mode == Off || p.Mode == "" {
		return Status{Mode: Off}, nil
	}
	s := &Status{Mode: p.Mode}
	if p.Mode == Auto {
		s.Mode = On
	}
	if !entering.CompareAndSwap(false, true) {
		return *s, ErrEntered
	}
	steps := []func(*Status) error{p.noDumps, p.dropCapabilities, p.restrictFiles, p.filterCalls}
	if p.Mode == Log {
		steps = []func(*Status) error{p.filterCalls}
	}
	for _, step := range steps {
		if err := step(s); err != nil {
			return *s, fmt.Errorf("enter the sandbox: %w", err)
		}
	}
	current.Store(s)
	return *s, nil
}

var entering atomic.Bool

// lacks notes that the host does not give something, which is an error in mode On.
func (p Policy) lacks(s *Status, what string, errno error, so string) error {
	text := fmt.Sprintf("%s: %v (%s)", what, errno, so)
	if p.Mode == On {
		return fmt.Errorf("%w: %s", ErrNotGiven, text)
	}
	s.Missing = append(s.Missing, text)
	return nil
}

// noDumps keeps guest memory and keys out of core dumps, and other processes of this user
// from attaching to this one (ptrace(2), /proc/PID/mem).
func (p Policy) noDumps(*Status) error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("set RLIMIT_CORE to 0: %w", err)
	}
	// A core_pattern that is a pipe does not ask for the limit, but for this.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE 0: %w", err)
	}
	return nil
}
