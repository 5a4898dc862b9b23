package serial

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// terminal is a terminal that goes into raw mode and back.
type terminal struct {
	fd int

	// modeMu guards saved.
	modeMu sync.Mutex
	saved  *term.State // the mode before raw mode; nil when not raw
}

// rawTerminals are the terminals that RestoreTerminals restores.
var rawTerminals struct {
	listMu sync.Mutex // guards list
	list   map[*terminal]struct{}
}

// RestoreTerminals restores the mode of every terminal that a stdio backend has made
// raw. A backend's Close does so for its own terminal; RestoreTerminals is for the
// other ways to exit: a signal handler, a goroutine that panics, os.Exit. It may be
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

// newTerminal returns the terminal of fd, or nil if fd is not a terminal.
func newTerminal(fd int) *terminal {
	if !term.IsTerminal(fd) {
		return nil
	}
	return &terminal{fd: fd}
}

// background reports whether this process is a background job of the terminal, so
// that reading from it, or changing its mode, would stop the process. It is not if
// the terminal is not the controlling one.
func (t *terminal) background() bool {
	foreground, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	return err == nil && foreground != unix.Getpgrp()
}

// makeRaw puts the terminal into raw mode: every key goes to the guest, Ctrl-C too.
// The output mode does not change, so that messages of govmm and of other programs
// keep their line ends.
func (t *terminal) makeRaw() error {
	t.modeMu.Lock()
	defer t.modeMu.Unlock()
	if t.saved != nil {
		return nil
	}
	before, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	if err != nil {
		return fmt.Errorf("get the terminal's mode: %w", err)
	}
	saved, err := term.MakeRaw(t.fd)
	if err != nil {
		return fmt.Errorf("put the terminal into raw mode: %w", err)
	}
	t.saved = saved
	rawTerminals.listMu.Lock()
	if rawTerminals.list == nil {
		rawTerminals.list = make(map[*terminal]struct{})
	}
	rawTerminals.list[t] = struct{}{}
	rawTerminals.listMu.Unlock()

	raw, err := unix.IoctlGetTermios(t.fd, unix.TCGETS)
	if err == nil {
		raw.Oflag = before.Oflag
		err = unix.IoctlSetTermios(t.fd, unix.TCSETS, raw)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("put the terminal into raw mode: %w", err), t.restoreLocked())
	}
	return nil
}

// restore undoes makeRaw. It does nothing if the terminal is not raw.
func (t *terminal) restore() error {
	t.modeMu.Lock()
	defer t.modeMu.Unlock()
	return t.restoreLocked()
}

func (t *terminal) restoreLocked() error {
	if t.saved == nil {
		return nil
	}
	saved := t.saved
	t.saved = nil
	rawTerminals.listMu.Lock()
	delete(rawTerminals.list, t)
	rawTerminals.listMu.Unlock()
	if t.background() {
		return nil // the shell has set the mode for its foreground job
	}
	if err := term.Restore(t.fd, saved); err != nil {
		return fmt.Errorf("restore the terminal's mode: %w", err)
	}
	return nil
}
