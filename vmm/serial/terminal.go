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

// rawTerminals are those that RestoreTerminals has to put back.
var rawTerminals struct {
	listMu sync.Mutex // guards list
	list   map[*terminal]struct{}
}

// RestoreTerminals puts every terminal that a stdio backend has made raw back
// into the mode it was in. A backend's Close does so for its own; this is for
// the other ways out: a signal's handler, the deferred recover of a goroutine
// that panicked, before os.Exit. It may be called at any time, more than once.
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

// newTerminal returns the terminal that fd is, or nil if it is none.
func newTerminal(fd int) *terminal {
	if !term.IsTerminal(fd) {
		return nil
	}
	return &terminal{fd: fd}
}

// background says whether this process is a background job of the terminal:
// reading from it, or changing its mode, would stop the process. A terminal
// that does not control us has no jobs of ours.
func (t *terminal) background() bool {
	foreground, err := unix.IoctlGetInt(t.fd, unix.TIOCGPGRP)
	return err == nil && foreground != unix.Getpgrp()
}

// makeRaw puts the terminal into raw mode, if it is not: every key goes to the
// guest, Ctrl-C too. Output stays as it is, so that other programs' and our
// own messages keep their line ends.
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

// restore undoes makeRaw, if it was done.
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
		return nil // the shell has taken the terminal, and set its mode
	}
	if err := term.Restore(t.fd, saved); err != nil {
		return fmt.Errorf("put the terminal back into its mode: %w", err)
	}
	return nil
}
