package sandbox

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// EnterBare puts this process into a cage that leaves it the descriptors that it has open,
// to be read and written, and memory: no file, no socket, no other process. It is for a
// process whose work is to look at what nobody vouches for and to answer on a socket. It
// takes the place of [Policy.Enter]; what the host does not give is in the status.
func EnterBare() (Status, error) {
	s := &Status{Mode: On}
	if !entering.CompareAndSwap(false, true) {
		return *s, ErrEntered
	}
	p := Policy{Mode: Auto, Ports: []uint16{}} // no port, no file
	for _, step := range []func(*Status) error{p.noDumps, p.dropCapabilities, p.restrictFiles, p.filterBare} {
		if err := step(s); err != nil {
			return *s, fmt.Errorf("enter the sandbox: %w", err)
		}
	}
	current.Store(s)
	return *s, nil
}

// filterBare filters the system calls of all threads.
func (p Policy) filterBare(s *Status) error {
	if err := supported(); err != nil {
		return p.lacks(s, "seccomp", err, "system calls are not filtered")
	}
	if err := catch(); err != nil {
		return err
	}
	program, err := assemble(bareRules(), unix.SECCOMP_RET_TRAP)
	if err == nil {
		_, err = install(program, unix.SECCOMP_FILTER_FLAG_TSYNC)
	}
	s.Seccomp = err == nil
	return err
}

// bareRules are those of Go's runtime, and to read and write what is open.
func bareRules() []rule {
	list := always("futex", "read", "write", "close", "nanosleep", "rt_sigreturn", "sched_yield", "clock_gettime", "getpid", "gettid", "rt_sigprocmask", "madvise",
		"epoll_pwait", "epoll_create1", "epoll_ctl", "eventfd2", "fcntl", "pread64",
		"poll", "writev") // of the handler that says what was not allowed
	return append(list, runtimeRules(uint32(unix.Getpid()))...)
}
