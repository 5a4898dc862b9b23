// Package screen draws lines of text on a whole terminal and reads its keys, with ANSI's
// escape sequences (ECMA-48) alone: it needs no description of the terminal, and costs a
// process that does not use it nothing.
package screen

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/rawterm"
	"golang.org/x/sys/unix"
)

// What is printed when the terminal becomes ours and when it is given back: the alternate
// screen, the cursor, and whether lines that are too long wrap.
const (
	enter = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J"
	leave = "\x1b[m\x1b[?7h\x1b[?25h\x1b[?1049l"
)

// Style is how a line looks.
type Style int

// The styles of a line.
const (
	Plain Style = iota
	Reverse
	Bold
	Faint
)

// codes are those of the styles (ECMA-48, SGR).
var codes = [...]string{Plain: "", Reverse: "\x1b[7m", Bold: "\x1b[1m", Faint: "\x1b[2m"}

// Line is a line of the screen. Text is printable ASCII; anything else is drawn as a
// question mark. A line of style Reverse reaches to the right edge.
type Line struct {
	Text  string
	Style Style
}

// Screen is a terminal that is drawn on. One goroutine calls its methods.
type Screen struct {
	file    *os.File
	tty     *rawterm.Terminal
	wake    int // eventfd: something has changed for the reader
	keys    chan Key
	changed chan struct{}
	winch   chan os.Signal
	readers sync.WaitGroup

	width, height int
	drawn         []string // what is on the screen; nil: not known

	// stateMu guards all below.
	stateMu sync.Mutex
	closed  bool
	lent    bool          // another program has the terminal
	idle    chan struct{} // closed when the reader has noticed that; nil: it need not say
	fresh   bool          // the screen has become ours again
}

// Open takes a terminal, which must be open for reading and writing. watcher is the command
// of a process that calls [rawterm.Watch].
func Open(file *os.File, watcher []string) (*Screen, error) {
	s := &Screen{file: file, keys: make(chan Key), changed: make(chan struct{}, 1), winch: make(chan os.Signal, 1)}
	var err error
	if s.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	s.tty = rawterm.New(file, rawterm.Options{Watcher: watcher, Wake: s.signal, Enter: enter, Leave: leave})
	if s.tty == nil {
		_ = unix.Close(s.wake)
		return nil, fmt.Errorf("%s: expected a terminal", file.Name())
	}
	signal.Notify(s.winch, unix.SIGWINCH)
	s.readers.Go(s.read)
	s.readers.Go(func() {
		for range s.winch {
			s.noteChange()
		}
	})
	return s, nil
}

// Keys brings the keys that are pressed; it is closed when the terminal has gone.
func (s *Screen) Keys() <-chan Key { return s.keys }

// Changed says that the size has changed, or what is on the screen is not known any more: it
// is to be drawn again.
func (s *Screen) Changed() <-chan struct{} { return s.changed }

// Size returns how many columns and lines there are.
func (s *Screen) Size() (width, height int) {
	ws, err := unix.IoctlGetWinsize(int(s.file.Fd()), unix.TIOCGWINSZ)
	if err != nil || ws.Col == 0 || ws.Row == 0 {
		return 80, 24
	}
	return int(ws.Col), int(ws.Row)
}

// Draw shows lines from the top of the screen, as many as there is room for, and nothing
// below. Only lines that have changed are printed. While the terminal is not ours, nothing is.
func (s *Screen) Draw(lines []Line) {
	width, height := s.Size()
	s.stateMu.Lock()
	fresh := s.fresh
	s.fresh = false
	s.stateMu.Unlock()
	if fresh || width != s.width || height != s.height {
		s.drawn = nil
	}
	s.width, s.height = width, height
	var out strings.Builder
	if s.drawn == nil {
		out.WriteString("\x1b[m\x1b[2J")
	}
	next := make([]string, height)
	for i := range next {
		if i < len(lines) {
			next[i] = lines[i].encode(width)
		}
		if s.drawn == nil && next[i] == "" || s.drawn != nil && s.drawn[i] == next[i] {
			continue
		}
		fmt.Fprintf(&out, "\x1b[%d;1H%s\x1b[K", i+1, next[i])
	}
	if out.Len() == 0 {
		return
	}
	if s.drawn = nil; s.tty.Draw(out.String()) {
		s.drawn = next
	}
}

// encode returns what is printed for a line.
func (l Line) encode(width int) string {
	b := []byte(l.Text[:min(len(l.Text), width)])
	for i, c := range b {
		if c < ' ' || c > '~' {
			b[i] = '?'
		}
	}
	if l.Style == Reverse {
		for len(b) < width {
			b = append(b, ' ')
		}
	}
	if l.Style == Plain || len(b) == 0 {
		return string(b)
	}
	return codes[l.Style] + string(b) + "\x1b[m"
}

// Lend gives the terminal to another program, as it was, until Take.
func (s *Screen) Lend() error {
	s.stateMu.Lock()
	if s.closed || s.lent {
		s.stateMu.Unlock()
		return errors.New("the terminal is not there to be lent")
	}
	idle := make(chan struct{})
	s.lent, s.idle = true, idle
	s.stateMu.Unlock()
	s.signal()
	<-idle
	return s.tty.Restore()
}

// Take takes the terminal back.
func (s *Screen) Take() {
	s.stateMu.Lock()
	s.lent = false
	s.stateMu.Unlock()
	s.signal()
}

// Suspend stops this job, as Ctrl-Z does; it returns when it goes on.
func (s *Screen) Suspend() { _ = unix.Kill(0, unix.SIGTSTP) }

// Redraw makes the next Draw print every line.
func (s *Screen) Redraw() { s.drawn = nil }

// Close gives the terminal back as it was.
func (s *Screen) Close() error {
	s.stateMu.Lock()
	was := s.closed
	s.closed = true
	s.stateMu.Unlock()
	if was {
		return nil
	}
	signal.Stop(s.winch)
	close(s.winch)
	s.signal()
	s.readers.Wait()
	err := s.tty.Close()
	_ = unix.Close(s.wake)
	return err
}

// signal wakes the reader.
func (s *Screen) signal() {
	one := [8]byte{1}
	_, _ = unix.Write(s.wake, one[:])
}

func (s *Screen) noteChange() {
	select {
	case s.changed <- struct{}{}:
	default: // it has been said
	}
}

const (
	// foregroundEvery is how often a background job looks whether it has the terminal: a
	// shell that brings it to the front does not say so.
	foregroundEvery = 200 * time.Millisecond
	// escapeTime is how long the rest of an escape sequence may take: without one it was
	// the key Esc.
	escapeTime = 50 * time.Millisecond
)

// read reads keys, until the screen is closed or the terminal has gone.
func (s *Screen) read() {
	defer close(s.keys)
	var pending []byte
	for {
		mine, open := s.mine()
		if !open {
			return
		}
		fd, timeout := int32(s.file.Fd()), -1
		if mine {
			if len(pending) > 0 {
				timeout = int(escapeTime.Milliseconds())
			}
		} else {
			fd, timeout, pending = -1, int(foregroundEvery.Milliseconds()), nil
		}
		fds := []unix.PollFd{{Fd: fd, Events: unix.POLLIN}, {Fd: int32(s.wake), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, timeout)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return
		case fds[1].Revents != 0:
			var count [8]byte
			_, _ = unix.Read(s.wake, count[:])
			continue
		case n == 0 && !s.send(parseAll(pending, true)):
			return
		case n == 0:
			pending = nil
			continue
		case s.tty.Background(): // these keys are another job's
			continue
		}
		buf := make([]byte, 1024)
		n, err = unix.Read(int(fd), buf)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.EIO) && s.tty.Background():
			continue
		case err != nil || n == 0:
			return // the terminal has gone
		}
		pending = append(pending, buf[:n]...)
		keys, rest := parse(pending)
		pending = rest
		if !s.send(keys) {
			return
		}
	}
}

// mine takes the terminal, if it is ours to take, and reports whether it is, and whether the
// screen is still open.
func (s *Screen) mine() (mine, open bool) {
	s.stateMu.Lock()
	closed, lent := s.closed, s.lent
	if s.idle != nil && lent {
		close(s.idle)
		s.idle = nil
	}
	s.stateMu.Unlock()
	switch {
	case closed:
		return false, false
	case lent:
		return false, true
	case s.tty.Background():
		_ = s.tty.Restore() // notes that the mode is another job's
		return false, true
	}
	entered, err := s.tty.MakeRaw()
	if err != nil {
		return false, false
	}
	if entered {
		s.stateMu.Lock()
		s.fresh = true
		s.stateMu.Unlock()
		s.noteChange()
	}
	return true, true
}

// send passes keys on, and reports whether the screen is still open. A screen that is being
// closed, or lent, drops them.
func (s *Screen) send(keys []Key) bool {
	for _, k := range keys {
		for sent := false; !sent; {
			select {
			case s.keys <- k:
				sent = true
			case <-time.After(foregroundEvery):
				s.stateMu.Lock()
				closed, lent := s.closed, s.lent
				s.stateMu.Unlock()
				if closed || lent {
					return !closed
				}
			}
		}
	}
	return true
}
