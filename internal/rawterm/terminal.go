// Package rawterm puts a terminal into raw mode, and back: on every way out of the process,
// while it is stopped, and while it is a background job.
package rawterm

import (
	"fmt"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Options are what a terminal needs. The zero value is valid.
type Options struct {
	// Watcher is the command of a process that calls [Watch], so that the terminal is
	// restored however this process ends; nil: it is not, after a panic and SIGKILL.
	Watcher []string
	// Wake is called after the process was stopped and goes on: whoever reads is to call
	// MakeRaw again. nil: nobody is told.
	Wake func()
	// Enter and Leave are printed after the terminal has become raw, and before it is no
	// longer: for programs that draw. Leave has at most 64 bytes.
	Enter, Leave string
}

// Terminal is a terminal with its two modes.
type Terminal struct {
	file *os.File
	fd   int
	opt  Options
	out  int // for what is printed: a descriptor that does not block, if there is one

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
	list   map[*Terminal]struct{}
}

// RestoreAll restores every terminal that is raw. Close does so for its own terminal, and
// signals that end or stop the process do; RestoreAll is for the other ways to exit, such as
// os.Exit. It may be called at any time, more than once.
func RestoreAll() {
	rawTerminals.listMu.Lock()
	all := make([]*Terminal, 0, len(rawTerminals.list))
	for t := range rawTerminals.list {
		all = append(all, t)
	}
	rawTerminals.listMu.Unlock()
	for _, t := range all {
		_ = t.Restore()
	}
}

// maxLeave bounds Options.Leave.
const maxLeave = 64

// New returns the terminal that f is, or nil if it is none. Its mode does not change yet.
func New(f *os.File, opt Options) *Terminal {
	if !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	if opt.Wake == nil {
		opt.Wake = func() {}
	}
	opt.Leave = opt.Leave[:min(len(opt.Leave), maxLeave)]
	t := &Terminal{file: f, fd: int(f.Fd()), opt: opt, out: -1, signals: make(chan os.Signal, 8), done: make(chan struct{})}
	if opt.Enter != "" {
		t.out = openOutput(t.fd)
	}
	// The guest runs on while its process is a background job: a read that comes too
	// late fails (EIO), and does not stop it.
	signal.Ignore(unix.SIGTTIN, unix.SIGTTOU)
	signal.Notify(t.signals, unix.SIGQUIT, unix.SIGABRT, unix.SIGTSTP, unix.SIGCONT)
	if opt.Watcher != nil {
		// Now, since a sandbox may forbid it later. Without a watcher, a panic or SIGKILL
		// leaves the terminal raw: no reason not to run.
		t.watcher, _ = startWatcher(opt.Watcher, f)
	}
	go t.handleSignals()
	return t
}

// handleSignals restores the terminal before a signal takes its effect.
func (t *Terminal) handleSignals() {
	for {
		select {
		case <-t.done:
			return
		case s := <-t.signals:
			switch s {
			case unix.SIGCONT:
				t.opt.Wake()
			case unix.SIGTSTP:
				_ = t.Restore()
				_ = unix.Kill(unix.Getpid(), unix.SIGSTOP)
			default:
				_ = t.Restore()
				signal.Reset(s)
				_ = unix.Kill(unix.Getpid(), s.(unix.Signal))
			}
		}
	}
}

// Background reports whether this process is a background job of the terminal, whose keys
// and mode are another job's. It is not if the terminal is not the controlling one.
func (t *Terminal) Background() bool {
	foreground, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	return err == nil && foreground != unix.Getpgrp()
}

// MakeRaw puts the terminal into raw mode: every key goes to who reads, Ctrl-C too.
// The output mode does not change, so that messages of govmm and of other programs
// keep their line ends. It is called again whenever the mode may have changed. entered says
// that it was not raw before, for who reads.
func (t *Terminal) MakeRaw() (entered bool, err error) {
	t.modeMu.Lock()
	defer t.modeMu.Unlock()
	if t.closed {
		return false, nil
	}
	now, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	if err != nil {
		return false, fmt.Errorf("get the terminal's mode: %w", err)
	}
	if t.isRaw && *now == t.raw {
		return false, nil
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
		if t.watcher.tell(&t.before, &raw, t.opt.Leave) != nil { // it has been killed
			t.watcher.close()
			t.watcher = nil
		}
	}
	if err := unix.IoctlSetTermios(t.fd, unix.TCSETS, &raw); err != nil {
		return false, fmt.Errorf("put the terminal into raw mode: %w", err)
	}
	again := t.isRaw // its mode was changed by somebody else
	t.isRaw, t.raw = true, raw
	if !again {
		t.print(t.opt.Enter, enterTime)
	}
	rawTerminals.listMu.Lock()
	defer rawTerminals.listMu.Unlock()
	if rawTerminals.list == nil {
		rawTerminals.list = make(map[*Terminal]struct{})
	}
	rawTerminals.list[t] = struct{}{}
	return !again, nil
}

// Restore undoes MakeRaw. It does nothing if the terminal is not raw, or is another
// job's: the shell has set the mode for its foreground job.
func (t *Terminal) Restore() error {
	t.modeMu.Lock()
	defer t.modeMu.Unlock()
	if !t.isRaw {
		return nil
	}
	t.isRaw = false
	rawTerminals.listMu.Lock()
	delete(rawTerminals.list, t)
	rawTerminals.listMu.Unlock()
	if t.Background() {
		return nil
	}
	t.print(t.opt.Leave, leaveTime)
	if err := unix.IoctlSetTermios(t.fd, unix.TCSETS, &t.before); err != nil {
		return fmt.Errorf("restore the terminal's mode: %w", err)
	}
	return nil
}

// Close restores the terminal, which stays as it is then.
func (t *Terminal) Close() error {
	err := t.Restore()
	t.modeMu.Lock()
	defer t.modeMu.Unlock()
	if t.closed {
		return err
	}
	t.closed = true
	if t.out >= 0 {
		_ = unix.Close(t.out)
	}
	signal.Stop(t.signals)
	signal.Reset(unix.SIGTTIN, unix.SIGTTOU)
	close(t.done)
	if t.watcher != nil {
		t.watcher.close()
		t.watcher = nil
	}
	return err
}
