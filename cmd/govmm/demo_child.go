package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// child is a govmm process of the demo.
type child struct {
	name   string
	socket string
	cmd    *exec.Cmd
	exited chan struct{} // closed once the process is reaped and its output read
}

// event is one line that a child printed, or its end.
type event struct {
	from *child
	text string
	ours bool // a line of govmm (stderr), not of the guest
	exit bool
}

// startChild runs govmm with args; each line that it prints becomes an event. The
// caller's goroutine must be locked to its thread: the kernel kills the child when
// that thread ends (PR_SET_PDEATHSIG), also after kill -9 of the demo.
func startChild(name, socket string, events chan<- event, args ...string) (*child, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := &child{name: name, socket: socket, exited: make(chan struct{})}
	c.cmd = exec.Command(exe, append(args, "--api-socket", socket)...)
	c.cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true, // Ctrl-C reaches the demo only, which ends its children in order
		Pdeathsig: syscall.SIGKILL,
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stderr, err := c.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the %s: %w", name, err)
	}
	go func() {
		var readers sync.WaitGroup
		readers.Go(func() { c.read(stdout, events, false) })
		readers.Go(func() { c.read(stderr, events, true) })
		readers.Wait()
		_ = c.cmd.Wait() // ProcessState says how it ended
		events <- event{from: c, exit: true}
		close(c.exited)
	}()
	return c, nil
}

func (c *child) read(r io.Reader, events chan<- event, ours bool) {
	s := bufio.NewScanner(r)
	for s.Scan() {
		if text := strings.TrimRight(s.Text(), "\r"); text != "" {
			events <- event{from: c, text: text, ours: ours}
		}
	}
	_, _ = io.Copy(io.Discard, r) // a line too long for the scanner must not block the guest
}

// end stops the process, with SIGKILL if SIGTERM does not help, and reaps it. The
// caller goes on receiving events meanwhile.
func (c *child) end() {
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-c.exited:
		return
	case <-time.After(5 * time.Second):
	}
	_ = c.cmd.Process.Kill()
	<-c.exited
}

// stage has the children, and receives their events.
type stage struct {
	ctx      context.Context
	out      io.Writer
	events   chan event
	children []*child
	bad      uint64 // the largest count of bad pages in any tick
}

// start adds a child.
func (s *stage) start(name, socket string, args ...string) (*child, error) {
	c, err := startChild(name, socket, s.events, args...)
	if err == nil {
		s.children = append(s.children, c)
	}
	return c, err
}

// await prints events until done returns true for one, or extra, which may be nil,
// is closed. It fails after timeout, when a guest reports a bad page, and when a
// child ends and done does not return true for that.
func (s *stage) await(what string, timeout time.Duration, extra <-chan struct{}, done func(event) bool) error {
	limit := time.NewTimer(timeout)
	defer limit.Stop()
	for {
		select {
		case e := <-s.events:
			if err := s.show(e); err != nil {
				return err
			}
			if done(e) {
				return nil
			}
			if e.exit {
				return fmt.Errorf("the %s ended before %s (%v)", e.from.name, what, e.from.cmd.ProcessState)
			}
		case <-extra:
			return nil
		case <-limit.C:
			return fmt.Errorf("expected %s within %v, found nothing", what, timeout)
		case <-s.ctx.Done():
			return errors.New("interrupted")
		}
	}
}

// show prints a line of a guest or its govmm.
func (s *stage) show(e event) error {
	if e.exit {
		return nil
	}
	_, _ = fmt.Fprintf(s.out, "%-11s | %s\n", e.from.name, e.text)
	if t, ok := parseTick(e.text); ok && !e.ours {
		s.bad = max(s.bad, t.bad)
		if t.bad > 0 {
			return fmt.Errorf("the guest found %d bad pages at the %s", t.bad, e.from.name)
		}
	}
	return nil
}

// close ends all children and waits for them.
func (s *stage) close() {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var all sync.WaitGroup
		for _, c := range s.children {
			all.Go(c.end)
		}
		all.Wait()
	}()
	for {
		select {
		case <-s.events: // not shown any more
		case <-ended:
			return
		}
	}
}

// tick is the report that the demo guest prints once a second.
type tick struct {
	n                     uint64
	writes, verified, bad uint64  // pages, since the guest booted
	gap                   float64 // longest pause between two writes since the last tick, ms
}

// parseTick reads a line of the guest: tick N up=S writes=N verified=N bad=N gap=MS.
// It ignores the counters of the guest's drivers, which may follow.
func parseTick(line string) (tick, bool) {
	words := strings.Fields(line)
	if len(words) < 2 || words[0] != "tick" {
		return tick{}, false
	}
	var t tick
	var err error
	if t.n, err = strconv.ParseUint(words[1], 10, 64); err != nil {
		return tick{}, false
	}
	seen := 0
	for _, w := range words[2:] {
		key, value, _ := strings.Cut(w, "=")
		var err error
		switch key {
		case "writes":
			t.writes, err = strconv.ParseUint(value, 10, 64)
		case "verified":
			t.verified, err = strconv.ParseUint(value, 10, 64)
		case "bad":
			t.bad, err = strconv.ParseUint(value, 10, 64)
		case "gap":
			t.gap, err = strconv.ParseFloat(value, 64)
		default:
			continue
		}
		if err != nil {
			return tick{}, false
		}
		seen++
	}
	return t, seen == 4
}
