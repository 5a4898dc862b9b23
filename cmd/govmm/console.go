package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// consoleFlags are the flags of govmm console.
type consoleFlags struct {
	clientFlags
	line     string
	readOnly bool
	follow   bool
}

func newConsole() *cobra.Command {
	f := consoleFlags{clientFlags: guestFlags()}
	cmd := &cobra.Command{
		Use:   "console [NAME]",
		Short: "Attach to a VM's serial port or console",
		Long: `Attach to a VM's serial port, or to its virtio console.

First comes what the guest has written last (64 KiB). One at a time can type, any
number can look on. On a terminal Ctrl-A d detaches and Ctrl-A h lists the keys;
without a terminal input is what stdin has, and the command ends with the VM.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.line != vmm.LineSerial && f.line != vmm.LineConsole {
				return usagef(cmd, "--line %q: expected %s or %s", f.line, vmm.LineSerial, vmm.LineConsole)
			}
			if err := f.run(cmd, args); err != nil {
				return fmt.Errorf("%s: %w", tried(cmd, args), advise(err))
			}
			return nil
		},
	}
	f.register(cmd)
	_ = cmd.Flags().MarkHidden("json")
	cmd.Flags().StringVar(&f.line, "line", vmm.LineSerial, "`WHICH`: serial or console")
	cmd.Flags().BoolVar(&f.readOnly, "read-only", false, "only look on")
	cmd.Flags().BoolVar(&f.follow, "follow", false, "stay with a guest that moves to another process of this host")
	return cmd
}

func (f *consoleFlags) run(cmd *cobra.Command, args []string) error {
	c, err := f.client(cmd.Context(), args)
	if err != nil {
		return err
	}
	conn, err := c.Console(cmd.Context(), f.line, !f.readOnly)
	if err != nil {
		return err
	}
	s := consoleSession{out: cmd.OutOrStdout(), stderr: cmd.ErrOrStderr(), detach: make(chan struct{}), input: make(chan []byte)}
	restore, err := s.takeTerminal(cmd.InOrStdin())
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer restore()
	if !f.readOnly || s.raw {
		go s.read(cmd.InOrStdin())
	}
	for {
		whereabouts := f.watch(cmd.Context(), c)
		if s.join(cmd.Context(), conn, !f.readOnly) {
			return nil // detached
		}
		next := whereabouts()
		if !f.follow || next == nil {
			s.say("the line has ended")
			return nil
		}
		if conn, err = reattach(cmd.Context(), next, f.line, !f.readOnly); err != nil {
			return err
		}
		c = next
		s.say("the guest runs in another process of this host now: attached to that")
	}
}

// consoleSession is a user at a line.
type consoleSession struct {
	out, stderr io.Writer
	raw         bool // the user is at a terminal
	detach      chan struct{}
	input       chan []byte
}

// say tells the user something, between the guest's lines.
func (s *consoleSession) say(what string) {
	end := "\n"
	if s.raw {
		end = "\r\n"
	}
	_, _ = fmt.Fprintf(s.stderr, "%sgovmm: %s%s", end, what, end)
}

// takeTerminal makes every key the guest's, if in is a terminal.
func (s *consoleSession) takeTerminal(in io.Reader) (restore func(), err error) {
	file, ok := in.(*os.File)
	if !ok || !term.IsTerminal(int(file.Fd())) {
		return func() {}, nil
	}
	was, err := term.MakeRaw(int(file.Fd()))
	if err != nil {
		return nil, fmt.Errorf("put the terminal into raw mode: %w", err)
	}
	s.raw = true
	return func() { _ = term.Restore(int(file.Fd()), was) }, nil
}

const consoleHelp = "\r\ngovmm: Ctrl-A d        detach: the VM goes on\r\n" +
	"       Ctrl-A h        this help\r\n" +
	"       Ctrl-A Ctrl-A   send Ctrl-A to the guest\r\n"

// read passes on what the user types, until the end of it.
func (s *consoleSession) read(in io.Reader) {
	const prefix = 1 // Ctrl-A
	prefixed := false
	for {
		p := make([]byte, 4096)
		n, err := in.Read(p)
		var typed []byte
		for _, key := range p[:n] {
			switch {
			case !s.raw, prefixed && key == prefix, !prefixed && key != prefix:
				typed, prefixed = append(typed, key), false
			case !prefixed:
				prefixed = true
			default:
				prefixed = false
				switch key {
				case 'd', 'D':
					close(s.detach)
					return
				case 'h', 'H', '?':
					_, _ = io.WriteString(s.stderr, consoleHelp)
				}
			}
		}
		if len(typed) > 0 {
			select {
			case s.input <- typed:
			case <-s.detach:
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// join moves bytes between the user and a line, until the line ends (false) or the user
// detaches.
func (s *consoleSession) join(ctx context.Context, conn io.ReadWriteCloser, write bool) (detached bool) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(s.out, conn)
	}()
	defer func() {
		_ = conn.Close()
		<-ended
	}()
	for {
		select {
		case typed := <-s.input:
			if write {
				_, _ = conn.Write(typed) // a line that has ended is noticed below
			}
		case <-ended:
			return false
		case <-s.detach:
			return true
		case <-ctx.Done():
			return true
		}
	}
}

// watch remembers which receivers of this host wait where, and returns what finds the guest
// after it has left: nil if it runs nowhere here.
func (f *consoleFlags) watch(ctx context.Context, c *api.Client) (next func() *api.Client) {
	if !f.follow {
		return func() *api.Client { return nil }
	}
	ctx, cancel := context.WithCancel(ctx)
	waiting, to := map[string]*api.Client{}, "" // by the address that they wait at
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if entries, err := api.List(ctx, api.Directory()); err == nil {
				for _, e := range entries {
					if e.Info.Address != "" {
						waiting[e.Info.Address] = e.Client
					}
				}
			}
			if info, err := c.Info(ctx); err == nil && info.Migration != nil {
				to = info.Migration.Address
			}
			select {
			case <-ctx.Done():
			case <-time.After(followEvery):
			}
		}
	}()
	return func() *api.Client {
		cancel()
		<-done
		if c := waiting[to]; c != nil {
			return c
		}
		return arrivedAt(waiting)
	}
}

// arrivedAt is the one of some receivers to which a guest has come, nil if it is none or
// more than one: a quick migration is over before its destination was seen.
func arrivedAt(waiting map[string]*api.Client) (found *api.Client) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	for found == nil && ctx.Err() == nil {
		for _, c := range waiting {
			info, err := c.Info(ctx)
			switch {
			case err != nil || info.State == vmm.StateReceiving:
			case found != nil:
				return nil
			default:
				found = c
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	return found
}

// followEvery is how often a console that follows looks where its guest may go.
const followEvery = 250 * time.Millisecond

// reattach joins the line of a VM that is just arriving.
func reattach(ctx context.Context, c *api.Client, line string, write bool) (net.Conn, error) {
	for deadline := time.Now().Add(10 * time.Second); ; {
		conn, err := c.Console(ctx, line, write)
		if err == nil || time.Now().After(deadline) || ctx.Err() != nil {
			return conn, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}
