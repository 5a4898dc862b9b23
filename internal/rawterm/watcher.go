package rawterm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"
)

// A process that panics, or is killed, cannot restore its terminal. A small process of
// its own does it then: it has the terminal, and the ends of two pipes. The first one
// brings the modes, and ends with the process. To the second one the runtime writes what
// it prints when it gives up; its size is less than that, so the process does not end
// before the watcher has begun to read, and by then the terminal is as it was.

// Descriptors of the watcher: exec.Cmd's ExtraFiles begin at 3.
const (
	watcherModes = 3 + iota
	watcherCrash
	watcherTerminal
)

// modes are what a watcher is told: the mode to restore, the one that it replaces, and what
// to print before.
type modes struct {
	Before, Raw unix.Termios
	Leave       [maxLeave]byte // up to the first zero
}

// watcher is the process's end of the pipes.
type watcher struct{ modes, crash *os.File }

// startWatcher starts the process that command names, which calls WatchTerminal.
func startWatcher(command []string, terminal *os.File) (_ *watcher, err error) {
	modesR, modesW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer modesR.Close()
	crashR, crashW, err := os.Pipe()
	if err != nil {
		_ = modesW.Close()
		return nil, err
	}
	defer crashR.Close()
	w := &watcher{modesW, crashW}
	_, _ = unix.FcntlInt(crashW.Fd(), unix.F_SETPIPE_SZ, os.Getpagesize())
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = "/" // nothing is kept busy by it
	cmd.ExtraFiles = []*os.File{modesR, crashR, terminal}
	// In a session of its own no key, no other process's job control and no end of the
	// terminal's session reaches it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err = cmd.Start(); err == nil {
		go func() { _ = cmd.Wait() }()
		err = debug.SetCrashOutput(crashW, debug.CrashOptions{})
	}
	if err != nil {
		w.close()
		return nil, err
	}
	debug.SetTraceback("all") // which is more than a page
	return w, nil
}

// tell says what is to be restored from now on.
func (w *watcher) tell(before, raw *unix.Termios, leave string) error {
	m := modes{Before: *before, Raw: *raw}
	copy(m.Leave[:], leave)
	return binary.Write(w.modes, binary.NativeEndian, m)
}

// close ends the watcher. The terminal is not raw.
func (w *watcher) close() {
	_ = debug.SetCrashOutput(nil, debug.CrashOptions{})
	_ = w.modes.Close()
	_ = w.crash.Close()
}

// Watch is what the process of [Options.Watcher] does: it restores the terminal
// of the process that has started it when that one ends in a way in which it cannot do
// so itself, and returns.
func Watch() error {
	pipe, crash := os.NewFile(watcherModes, "modes"), os.NewFile(watcherCrash, "crash")
	fds := []unix.PollFd{{Fd: watcherModes, Events: unix.POLLIN}, {Fd: watcherCrash, Events: unix.POLLIN}}
	var last *modes
	for more := true; more; {
		switch _, err := unix.Poll(fds, -1); {
		case err == unix.EINTR:
		case err != nil:
			return err
		case fds[0].Revents != 0: // first: a process may end as soon as it has written them
			var m modes
			if more = binary.Read(pipe, binary.NativeEndian, &m) == nil; more {
				last = &m
			}
		default:
			more = false // it gives up
		}
	}
	defer func() { _, _ = io.Copy(io.Discard, crash) }() // to the end of the process
	if last == nil {
		return nil
	}
	now, err := unix.IoctlGetTermios(watcherTerminal, unix.TCGETS)
	if err == nil && *now == last.Raw { // another program may have it by now
		err = unix.IoctlSetTermios(watcherTerminal, unix.TCSETS, &last.Before)
		leave, _, _ := bytes.Cut(last.Leave[:], []byte{0})
		printOn(watcherTerminal, string(leave), watchTime)
	}
	if err != nil {
		return fmt.Errorf("restore the terminal's mode: %w", err)
	}
	return nil
}
