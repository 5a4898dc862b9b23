package netproc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A process that has given up the right to start others still needs a new one when that
// of its network has ended, and a receiver needs one when a guest comes. So a small
// process starts them, which does nothing else, reads nothing of a guest, and ends with
// the one that has started it.

// Descriptors of the processes: exec.Cmd's ExtraFiles begin at 3.
const (
	SpawnedFD  = 3 // of one that [Spawn] has started
	FramesFD   = 3 // of the process of a network: its end of the frames' stream
	MessagesFD = 4 // and of the messages
)

// order is what the starter is asked for.
type order struct{ Start bool }

// started is its answer, with two descriptors: frames and messages.
type started struct {
	Error string
	Last  string // how the process before has ended; "": there was none, or it was told to
}

// Starter starts processes of a network, one at a time.
type Starter struct {
	asking   sync.Mutex // is held while the starter is asked
	messages *Messages
}

// NewStarter starts command, which calls [Supervise].
func NewStarter(command []string, attr *syscall.SysProcAttr) (*Starter, error) {
	m, err := Spawn(command, attr)
	if err != nil {
		return nil, err
	}
	return &Starter{messages: m}, nil
}

// Spawn starts a process with the other end of the messages as descriptor [SpawnedFD].
func Spawn(command []string, attr *syscall.SysProcAttr) (*Messages, error) {
	ours, theirs, err := pair(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = "/" // nothing is kept busy by it
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, unix.Close(ours))
	}
	go func() { _ = cmd.Wait() }()
	return OpenMessages(ours)
}

// Close ends the starter and the process that it has started.
func (s *Starter) Close() error { return s.messages.Close() }

// Process is one that a Starter has started.
type Process struct {
	Frames   *os.File
	Messages *Messages
	// Last says how the one before has ended, if nobody told it to.
	Last string
}

// Close ends the process.
func (p *Process) Close() error { return errors.Join(p.Frames.Close(), p.Messages.Close()) }

// Start starts a process. The one that was started before is ended.
func (s *Starter) Start() (*Process, error) {
	answer, fds, err := s.ask()
	if err != nil {
		return nil, err
	}
	p := &Process{Frames: os.NewFile(uintptr(fds[0]), "frames"), Last: answer.Last}
	if p.Messages, err = OpenMessages(fds[1]); err != nil {
		return nil, errors.Join(err, p.Frames.Close())
	}
	return p, nil
}

// ask asks for a process; the answer comes with two descriptors.
func (s *Starter) ask() (answer started, fds []int, err error) {
	s.asking.Lock()
	defer s.asking.Unlock()
	if err := s.messages.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return answer, nil, err
	}
	if err = s.messages.send(order{Start: true}); err == nil {
		fds, err = s.messages.receive(&answer, 2)
	}
	if err == nil && answer.Error != "" {
		err = errors.New(answer.Error)
	}
	if err == nil && len(fds) != 2 {
		err = fmt.Errorf("expected 2 descriptors, got %d", len(fds))
	}
	if err != nil {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return answer, nil, fmt.Errorf("ask for the network's process: %w", err)
	}
	return answer, fds, nil
}

// Supervise is what the process of a [Starter] does: it starts command when it is asked
// to, until the other end is gone.
func Supervise(command []string) error {
	m, err := OpenMessages(SpawnedFD)
	if err != nil {
		return err
	}
	var now *running
	for {
		var o order
		if _, err := m.receive(&o, 0); err != nil || !o.Start {
			now.end()
			return err
		}
		var fds []int
		answer := started{Last: now.end()}
		if now, fds, err = run(command); err != nil {
			answer.Error = fmt.Sprintf("%.500s", err)
		}
		err := m.send(answer, fds...)
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		if err != nil {
			now.end()
			return err
		}
	}
}

// running is a process that was started.
type running struct {
	cmd   *exec.Cmd
	said  said
	ended chan struct{} // closed when it has
}

// run starts the process and returns the other ends of its descriptors.
func run(command []string) (_ *running, fds []int, err error) {
	var ends []*os.File
	defer func() {
		for _, f := range ends {
			_ = f.Close()
		}
		if err != nil {
			for _, fd := range fds {
				_ = unix.Close(fd)
			}
		}
	}()
	for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_SEQPACKET} {
		ours, theirs, err := pair(kind)
		if err != nil {
			return nil, fds, err
		}
		fds, ends = append(fds, ours), append(ends, theirs)
	}
	r := &running{cmd: exec.Command(command[0], command[1:]...), ended: make(chan struct{})}
	r.cmd.Dir, r.cmd.ExtraFiles, r.cmd.Stderr = "/", ends, &r.said
	if err := r.cmd.Start(); err != nil {
		return nil, fds, err
	}
	go func() {
		_ = r.cmd.Wait()
		close(r.ended)
	}()
	return r, fds, nil
}

// end ends the process, if there is one, and says how it had ended by itself before.
func (r *running) end() string {
	if r == nil {
		return ""
	}
	select {
	case <-r.ended:
	case <-time.After(50 * time.Millisecond): // it may be about to: its ends of the sockets are closed first
		_ = r.cmd.Process.Kill()
		<-r.ended
		return ""
	}
	if r.cmd.ProcessState.Success() {
		return ""
	}
	text := r.cmd.ProcessState.String()
	if line := r.said.line(); line != "" {
		text += ": " + line
	}
	return text
}

// said is the beginning of what a process has written to stderr.
type said struct{ buf bytes.Buffer }

// Write implements io.Writer.
func (s *said) Write(p []byte) (int, error) {
	if room := 1024 - s.buf.Len(); room > 0 {
		_, _ = s.buf.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// line is the first line of it.
func (s *said) line() string {
	line, _, _ := strings.Cut(strings.TrimSpace(s.buf.String()), "\n")
	return fmt.Sprintf("%.200s", line)
}

// pair makes a pair of sockets. Ours does not block.
func pair(kind int) (ours int, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "socketpair")
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return -1, nil, errors.Join(fmt.Errorf("socketpair: %w", err), unix.Close(fds[0]), theirs.Close())
	}
	return fds[0], theirs, nil
}
