package main

import (
	"io"
	"os"
	"time"

	"github.com/govmm/govmm/vmm"
	"golang.org/x/sys/unix"
)

// newArrivalLine is the line on which a receiver shows a guest that arrives. With --json, and
// with a command that waits for none, there is none.
func newArrivalLine(command string, f *hostFlags, stderr io.Writer) *progressLine {
	if command != "receive" || f.json {
		return &progressLine{}
	}
	return newProgressLine(stderr, "auto")
}

// over returns a writer that erases the line before it writes to w, its terminal.
func (l *progressLine) over(w io.Writer) io.Writer { return overLine{l, w} }

type overLine struct {
	line *progressLine
	w    io.Writer
}

func (o overLine) Write(p []byte) (int, error) {
	o.line.mu.Lock()
	defer o.line.mu.Unlock()
	o.line.erase()
	return o.w.Write(p)
}

// leave erases the line for good: the guest has the terminal.
func (l *progressLine) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.erase()
	l.out = nil
}

// showArrival draws how far a guest is that arrives, until stop is called, which does not
// wait for a terminal that takes nothing. A job in the background draws nothing.
func (p *process) showArrival(vm *vmm.VM) (stop func()) {
	var since time.Time
	end := p.line.during(func(time.Duration) string {
		in := vm.Info().Incoming
		if in == nil {
			since = time.Time{}
			return ""
		}
		if since.IsZero() {
			since = time.Now()
		}
		if time.Since(since) < lineAfter || !inForeground(p.stderr) {
			return ""
		}
		return arriving(*in)
	})
	return func() {
		ended := make(chan struct{})
		go func() { end(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(time.Second):
		}
	}
}

// inForeground reports whether this process is of the foreground job of a terminal.
func inForeground(terminal *os.File) bool {
	group, err := unix.IoctlGetInt(int(terminal.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}
