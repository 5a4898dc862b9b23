package serial

import (
	"fmt"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// terminal is a terminal that goes into raw mode and back: on every way out, while the
// process is stopped, and while it is a background job.
type terminal struct {
	file *os.File
	fd   int
	wake func() // makes the reader look whether the terminal is its again

	signals chan os.Signal
	done    chan struct{} // closed by close

	// modeMu guards all below.
	modeMu  sync.Mutex
	isRaw   bool
	closed  bool
	before  unix.Termios // the mode before raw mode
	raw     unix.Termios // raw mode, once it was set
	watcher *watcher     // nil: there is none, or it has been killed
}

// rawTerminals are the terminals that RestoreTerminals restores.
var rawTerminals struct {
	listMu sync.Mutex // guards list
	list   map[*terminal]struct{}
}

// RestoreTerminals restores the mode of every terminal that a stdio backend has made
// raw. A backend's Close does so for its own terminal, and signals that end or stop the
// process do; RestoreTerminals is for the other ways to exit, such as os.Exit. It may be
// called at any time, more than once.
func RestoreTerminals() {
	rawTerminals.listMu.Lock()
	all := make([]*terminal, 0, len(rawTerminals.list))
	for t := range rawTerminals.list {
		all = append(all, t)
	}
	rawTerminals.listMu.Unlock()
	for _, t := range all {
		_ = t.restore()
	}
}

// newTerminal returns the terminal that f is, or nil if it is none. command is that of its
// watcher; nil: there is none.
func newTerminal(f *os.File, command []string, wake func()) *terminal {
	if !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	t := &terminal{file: f, fd: int(f.Fd()), wake: wake, signals: make(chan os.Signal, 8), done: make(chan struct{})}
	// The guest runs on while its process is a background job: a read that comes too
	// late fails (EIO), and does not stop it.
	signal.Ignore(unix.SIGTTIN, unix.SIGTTOU)
	signal.Notify(t.signals, unix.SIGQUIT, unix.SIGABRT, unix.SIGTSTP, unix.SIGCONT)
	if command != nil {
		// Now, since a sandbox may forbid it later. Without a watcher, a panic or SIGKILL
		// leaves the terminal raw: no reason not to run.
		t.watcher, _ = startWatcher(command, f)
	}
	go t.handleSignals()
	return t
}

// handleSignals restores the terminal before a signal takes its effect.
func (t *terminal) handleSignals() {
	for {
		select {
		case <-t.done:
			return
		case s := <-t.signals:
			switch s {
			case unix.SIGCONT:
				t.wake()
			case unix.SIGTSTP:
				_ = t.restore()
				_ = unix.Kill(unix.Getpid(), unix.SIGSTOP)
			default:
				_ = t.restore()
				signal.Reset(s)
				_ = unix.Kill(unix.Getpid(), s.(unix.Signal))
			}
		}
	}
}

// background reports whether this process is a background job of the terminal, whose keys
// and mode are another job's. It is not if the terminal is not the controlling one.
func (t *terminal) background() bool {
	foreground, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	return err == nil && foreground != unix.Getpgrp()
}

// makeRaw puts the terminal into raw mode: every key goes to the guest, Ctrl-C too.
// The output mode does not change, so that messages of govmm and of other programs
// keep their line ends. It is called again whenever the mode may have changed.
func (t *terminal) makeRaw() error {
	t.modeMu.Lock()
	defer t.modeMu.Unlock()
	if t.closed {
		return nil
	}
	now, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	if err != nil {
		return fmt.Errorf("get the terminal's mode: %w", err)
	}
	if t.isRaw && *now == t.raw {
		return nil
	}
	if *now != t.raw { // a shell may restore raw mode for a job that was stopped
		t.before = *now
	}
	raw := t.before
	// As termios(3), cfmakeraw, but for the output.
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if t.watcher != nil {
		if t.watcher.tell(&t.before, &raw) != nil { // it has been killed
			t.watcher.close()
			t.watcher = nil
		}
	}
	if err := unix.IoctlSetTermios(t.fd, unix.TCSETS, &raw); err != nil {
		return fmt.Errorf("put the terminal into raw mode: %w", err)
	}
	t.isRaw, t.raw = true, raw
	rawTerminals.listMu.Lock()
	defer rawTerminals.listMu.Unlock()
	if rawTerminals.list == nil {
		rawTerminals.list = make(map[*terminal]struct{})
	}
	rawTerminals.list[t] = struct{}{}
	return nil
}

// restore undoes makeRaw. It does nothing if the terminal is not raw, or is another
// job's: the shell has set the mode for its foreground job.
func (t *terminal) restore() error {
	t.modeMu.Lock()
	defer t.modeMu.Unlock()
	if !t.isRaw {
		return nil
	}
	t.isRaw = false
	rawTerminals.listMu.Lock()
	delete(rawTerminals.list, t)
	rawTerminals.listMu.Unlock()
	if t.background() {
		return nil
	}
	if err := unix.IoctlSetTermios(t.fd, unix.TCSETS, &t.before); err != nil {
		return fmt.Errorf("restore the terminal's mode: %w", err)
	}
	return nil
}

// close restores the terminal, which stays as it is then.
func (t *terminal) close() error {
	err := t.restore()
	t.modeMu.Lock()
	defer t.modeMu.Unlock()
	if t.closed {
		return err
	}
	t.closed = true
	signal.Stop(t.signals)
	signal.Reset(unix.SIGTTIN, unix.SIGTTOU)
	close(t.done)
	if t.watcher != nil {
		t.watcher.close()
		t.watcher = nil
	}
	return err
}
