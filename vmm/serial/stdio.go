package serial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/internal/rawterm"
	"golang.org/x/sys/unix"
)

// stdio is the backend stdio. It reads and writes only when poll reports that it
// can, so that a call under way ends when the backend is closed.
type stdio struct {
	files  [2]*os.File // referenced so that the garbage collector does not close them
	in     int
	out    outputFD
	help   io.Writer
	quit   func()
	tty    *rawterm.Terminal // nil: input is not a terminal
	escape escape

	closed  atomic.Bool
	wakeIn  int // eventfd: context ended, or closed
	wakeOut int // eventfd: closed

	// inUse is held for reading by calls under way, and for writing by Close,
	// which waits for them before it closes descriptors.
	inUse sync.RWMutex
}

// outputFD is the descriptor for output, and how to write to it without blocking.
type outputFD struct {
	fd     int
	opened bool // fd was opened here, with O_NONBLOCK
	socket bool
	file   bool // a regular file
}

func openStdio(opt Options) (*stdio, error) {
	in, out, help := opt.Stdin, opt.Stdout, opt.Stderr
	if in == nil {
		in = os.Stdin
	}
	if out == nil {
		out = os.Stdout
	}
	if help == nil {
		help = os.Stderr
	}
	b := &stdio{files: [2]*os.File{in, out}, in: int(in.Fd()), help: help, quit: opt.Quit, wakeIn: -1, wakeOut: -1}
	if b.quit == nil {
		b.quit = func() {}
	}
	var err error
	for _, fd := range []*int{&b.wakeIn, &b.wakeOut} {
		if *fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
			b.closeDescriptors()
			return nil, fmt.Errorf("serial port on stdio: eventfd: %w", err)
		}
	}
	b.out = nonblocking(int(out.Fd()))
	b.tty = rawterm.New(in, rawterm.Options{Watcher: opt.Watcher, Wake: func() { signalEvent(b.wakeIn) }})
	return b, nil
}

// RestoreTerminals restores the mode of every terminal that a stdio backend has made
// raw. A backend's Close does so for its own terminal, and signals that end or stop the
// process do; RestoreTerminals is for the other ways to exit, such as os.Exit. It may be
// called at any time, more than once.
func RestoreTerminals() { rawterm.RestoreAll() }

// WatchTerminal is what the process of [Options.Watcher] does: it restores the terminal
// of the process that has started it when that one ends in a way in which it cannot do
// so itself, and returns.
func WatchTerminal() error { return rawterm.Watch() }

// nonblocking returns a way to write to fd without blocking. O_NONBLOCK on fd itself
// would affect every process that shares it, such as a shell. A terminal or pipe can
// be opened a second time, for a socket each call has a flag, and a file never
// blocks for long.
func nonblocking(fd int) outputFD {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err == nil {
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFSOCK:
			return outputFD{fd: fd, socket: true}
		case unix.S_IFREG:
			return outputFD{fd: fd, file: true}
		case unix.S_IFIFO, unix.S_IFCHR:
			again, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
			if err == nil {
				return outputFD{fd: again, opened: true}
			}
		}
	}
	return outputFD{fd: fd}
}

// Write writes all of p. It waits as long as it takes, or until Close.
func (b *stdio) Write(p []byte) (int, error) {
	b.inUse.RLock()
	defer b.inUse.RUnlock()
	done := 0
	for done < len(p) {
		switch ready, err := b.wait(b.out.fd, unix.POLLOUT, b.wakeOut, -1); {
		case err != nil:
			return done, err
		case !ready:
			continue
		}
		n, err := b.out.write(p[done:])
		switch {
		case err == nil:
			done += n
		case errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN):
		default:
			return done, fmt.Errorf("write serial output to stdout: %w", err)
		}
	}
	return done, nil
}

func (o outputFD) write(p []byte) (int, error) {
	switch {
	case o.socket:
		return unix.SendmsgN(o.fd, p, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	case !o.opened && !o.file:
		// Write may block: poll promises only a little room.
		p = p[:min(len(p), 256)]
	}
	return unix.Write(o.fd, p)
}

// ReadInput reads stdin; on a terminal, in raw mode and without commands for govmm.
// It is called by one goroutine at a time.
func (b *stdio) ReadInput(ctx context.Context, p []byte) (int, error) {
	b.inUse.RLock()
	defer b.inUse.RUnlock()
	if b.closed.Load() {
		return 0, io.EOF // the terminal stays as Close has left it
	}
	if len(p) == 0 {
		return 0, nil
	}
	signalled := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(signalled)
		signalEvent(b.wakeIn)
	})
	defer func() {
		if !stop() {
			<-signalled // the descriptor may be closed after the return
		}
	}()
	for {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		mine, err := b.takeTerminal()
		if err != nil {
			return 0, err
		}
		fd, timeout := b.in, -1
		if !mine {
			fd, timeout = -1, int(foregroundEvery.Milliseconds())
		}
		switch ready, err := b.wait(fd, unix.POLLIN, b.wakeIn, timeout); {
		case errors.Is(err, os.ErrClosed):
			return 0, io.EOF
		case err != nil:
			return 0, err
		case !ready:
			continue // ctx has ended, or one of an earlier call; or the terminal may be back
		case b.tty != nil && b.tty.Background():
			continue // these keys are another job's
		}
		n, err := unix.Read(b.in, p)
		switch {
		case errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.EIO) && b.tty != nil && b.tty.Background():
			continue
		case errors.Is(err, unix.EIO) || err == nil && n == 0:
			return 0, io.EOF // EIO: the terminal has gone
		case err != nil:
			return 0, fmt.Errorf("read serial input from stdin: %w", err)
		}
		if b.tty != nil {
			n = b.escape.filter(p[:n], b.command)
		}
		if n > 0 {
			return n, nil
		}
	}
}

// foregroundEvery is how often a background job looks whether it has the terminal:
// a shell that brings it to the front does not say so.
const foregroundEvery = 200 * time.Millisecond

// takeTerminal puts a terminal into raw mode, and reports whether the input is ours: a
// background job leaves it alone.
func (b *stdio) takeTerminal() (mine bool, err error) {
	if b.tty == nil {
		return true, nil
	}
	if b.tty.Background() {
		return false, b.tty.Restore() // notes that the mode is another job's
	}
	_, err = b.tty.MakeRaw()
	return true, err
}

// command carries out a command: the key after Ctrl-A.
func (b *stdio) command(key byte) {
	switch key {
	case 'x', 'X':
		b.quit()
	case 'h', 'H', '?':
		_, _ = io.WriteString(b.help, helpText)
	}
}

// wait waits until fd is ready (true), or until wake is signalled, which it resets, or
// so many milliseconds have passed, if timeout is not -1 (false), or until the backend is
// closed (an error). fd may be -1.
func (b *stdio) wait(fd int, events int16, wake, timeout int) (bool, error) {
	for {
		if b.closed.Load() {
			return false, fmt.Errorf("serial port on stdio: %w", os.ErrClosed)
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: events}, {Fd: int32(wake), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, timeout)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return false, fmt.Errorf("serial port on stdio: poll: %w", err)
		case b.closed.Load():
		case fds[1].Revents != 0:
			var count [8]byte
			_, _ = unix.Read(wake, count[:])
			return false, nil
		case n == 0:
			return false, nil
		default:
			return true, nil // also on an error of fd, which the call then returns
		}
	}
}

// signalEvent makes an eventfd readable.
func signalEvent(fd int) {
	one := [8]byte{1}
	_, _ = unix.Write(fd, one[:])
}

// Close restores the terminal and ends calls under way.
func (b *stdio) Close() error {
	if b.closed.Swap(true) {
		return nil
	}
	// First, because a write that is stuck must not keep the terminal raw.
	var err error
	if b.tty != nil {
		err = b.tty.Close()
	}
	signalEvent(b.wakeIn)
	signalEvent(b.wakeOut)
	b.inUse.Lock()
	defer b.inUse.Unlock()
	b.closeDescriptors()
	return err
}

func (b *stdio) closeDescriptors() {
	for _, fd := range []int{b.wakeIn, b.wakeOut} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	if b.out.opened {
		_ = unix.Close(b.out.fd)
	}
}
