package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/govmm/govmm/internal/fdpass"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/serial"
)

// successor is the process that is to take the guest over, as the one that has the guest
// sees it.
type successor struct {
	p    *process
	word *word

	connected chan *net.UnixConn // what leads to it; closed when it does not come
	over      chan struct{}      // closed when the upgrade has ended without it
	startOnce sync.Once
	startErr  error
	ready     chan struct{} // closed when it waits for connections, or startErr is set

	// What follows belongs to whoever has seen ready.
	conn   *fdpass.Conn
	hello  hello
	relay  *os.File   // this end of its stdio, if this process stays as its attendant
	exited chan int   // holds its exit status, if it has said one
	ended  chan error // closed when it has ended, or is not listened to any more
}

// startTime bounds how long the new process may take until it is ready.
const startTime = 10 * time.Second

// upgrade begins to let the guest go on in another process.
func (p *process) upgrade(vm *vmm.VM) (api.Upgrading, error) {
	if p.recorded != nil {
		return api.Upgrading{}, kind.State("this VM cannot be upgraded: %w", p.recorded)
	}
	w, err := newWord()
	if err != nil {
		return api.Upgrading{}, err
	}
	s := &successor{p: p, word: w, connected: make(chan *net.UnixConn, 1), over: make(chan struct{}), ready: make(chan struct{}), exited: make(chan int, 1), ended: make(chan error)}
	shared := vm.SharesMemory()
	m, err := vm.StartUpgrade(vmm.Upgrade{
		Dial: s.dial, Referee: w, Give: s.give, Lines: s.lines, Left: s.left,
		Hold:     func() { p.hold(true) },
		Continue: func() { p.hold(false) },
	}, migrate.Options{})
	if err != nil {
		w.close()
		return api.Upgrading{}, err
	}
	go func() {
		<-m.Done()
		if m.Result().Status != string(migrate.PhaseCompleted) { // otherwise left comes, or has come
			s.giveUp()
		}
	}()
	return api.Upgrading{Shared: shared, Adopt: func(c *net.UnixConn) {
		if c == nil {
			close(s.connected)
			return
		}
		s.connected <- c // there is room for it
		select {
		case <-s.over:
			s.drop()
		default:
		}
	}}, nil
}

// hold takes nothing from what the new process takes over, or goes on with it.
func (p *process) hold(on bool) {
	for _, l := range []serial.Backend{p.serial, p.console} {
		switch {
		case l == nil:
		case on:
			serial.Hold(l)
		default:
			serial.Continue(l)
		}
	}
	if on {
		p.claim.Hold()
	} else {
		p.claim.Continue()
	}
	if p.attendant != nil && on {
		p.attendant.Hold()
	} else if p.attendant != nil {
		p.attendant.Continue()
	}
}

// dial makes a connection to the new process, when it is ready.
func (s *successor) dial(ctx context.Context) (net.Conn, error) {
	s.startOnce.Do(func() { go s.start(ctx) })
	<-s.ready // start ends with the first ctx, and says what is missing; the next calls come later
	if s.startErr != nil {
		return nil, s.startErr
	}
	here, there, err := fdpass.Pair()
	if err != nil {
		return nil, err
	}
	defer here.Close()
	defer there.Close()
	if err := s.conn.Send(msgConn, nil, there); err != nil {
		return nil, err
	}
	return net.FileConn(here)
}

// start greets the new process, and gives it what it needs to get ready. ctx ends with the
// engine's own limit of the same length: it is the only clock here, so that the error says
// what did not come.
func (s *successor) start(ctx context.Context) {
	defer close(s.ready)
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	var c *net.UnixConn
	select {
	case c = <-s.connected:
	case <-ctx.Done():
		s.startErr = fmt.Errorf("it does not come within %v", startTime)
		return
	case <-s.over:
	}
	if c == nil {
		s.startErr = errors.New("it does not come")
		return
	}
	s.conn = fdpass.New(c)
	stop := context.AfterFunc(ctx, func() { _ = s.conn.SetDeadline(time.Unix(1, 0)) })
	if s.startErr = s.greet(); s.startErr == nil && !stop() {
		s.startErr = fmt.Errorf("it is not ready within %v", startTime)
	}
	if s.startErr != nil {
		_ = s.conn.Close()
		return
	}
	go s.listen()
}

func (s *successor) greet() error {
	if err := s.expect(msgHello, &s.hello); err != nil {
		return err
	}
	if s.hello.Protocol != takeOverProtocol {
		return fmt.Errorf("it speaks version %d of the protocol, expected %d", s.hello.Protocol, takeOverProtocol)
	}
	w, files, err := s.welcome()
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	if err != nil {
		return err
	}
	if err := s.conn.Send(msgWelcome, w, files...); err != nil {
		return err
	}
	return s.expect(msgReady, &struct{}{})
}

// expect receives a message of a kind.
func (s *successor) expect(kind string, v any) error {
	m, err := s.conn.Receive()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("it does not say %s within %v", kind, startTime)
	case errors.Is(err, fdpass.ErrEnded), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("it ended before it was ready")
	case err != nil:
		return fmt.Errorf("wait for its %s: %w", kind, err)
	}
	defer m.Close()
	if m.Kind == msgRefuse {
		var r refuseMsg
		if err := m.Decode(&r); err != nil {
			return err
		}
		return fmt.Errorf("it cannot take the guest over: %.1000s", r.Why)
	}
	if m.Kind != kind {
		return fmt.Errorf("expected its %s, found %.40q", kind, m.Kind)
	}
	return m.Decode(v)
}

// welcome collects what the new process needs. The files are the caller's, also after an
// error.
func (s *successor) welcome() (w welcome, files []*os.File, err error) {
	p := s.p
	w.Socket = p.claim.Socket()
	add := func(more []*os.File, e error) {
		files, err = append(files, more...), errors.Join(err, e)
	}
	one := func(f *os.File, e error) {
		if e == nil {
			add([]*os.File{f}, nil)
		}
		err = errors.Join(err, e)
	}
	one(machine.KVMFile())
	one(dup(s.word.file))
	add(p.claim.Files())
	one(dup(p.stderr))
	if p.attendant != nil {
		w.Attended, w.Attendant = true, true
		one(p.attendant.File())
	} else if p.notify == nil {
		w.Attended = true
	}
	if p.notify != nil {
		w.Notify = true
		one(dup(p.notify.socket))
	}
	for _, l := range []struct {
		b    serial.Backend
		kind *lineKind
		spec string
	}{{p.serial, &w.Serial, p.flags.serial}, {p.console, &w.Console, p.flags.console}} {
		switch {
		case l.b == nil || err != nil:
		case l.spec == "stdio":
			*l.kind = lineStdio
			add(s.stdio())
		default:
			f, e := serial.Listener(l.b)
			if err = errors.Join(err, e); f != nil {
				*l.kind = lineUnix
				files = append(files, f)
			}
		}
	}
	if err != nil {
		err = fmt.Errorf("collect what the new process needs: %w", err)
	}
	return w, files, err
}

// stdio is what the new process has as its stdio: that of this one, or, if this one stays
// with it, a stream that this one relays.
func (s *successor) stdio() ([]*os.File, error) {
	if s.p.stays() {
		here, there, err := fdpass.Pair()
		if err != nil {
			return nil, err
		}
		s.relay = here
		again, err := dup(there)
		if err != nil {
			return nil, errors.Join(err, there.Close())
		}
		return []*os.File{there, again}, nil
	}
	in, err := dup(s.p.stdin)
	if err != nil {
		return nil, err
	}
	out, err := dup(s.p.stdout)
	if err != nil {
		return nil, errors.Join(err, in.Close())
	}
	return []*os.File{in, out}, nil
}

// stays reports whether this process stays as the attendant of the new one: it is the one
// that somebody watches, and nobody can be told of another one.
func (p *process) stays() bool { return p.attendant == nil && p.notify == nil }

// listen takes what the new process says, to its end.
func (s *successor) listen() {
	defer close(s.ended)
	for {
		m, err := s.conn.Receive()
		if err != nil {
			return
		}
		var e exitMsg
		if m.Kind == msgExit && m.Decode(&e) == nil {
			select {
			case s.exited <- e.Status:
			default:
			}
		}
		m.Close()
	}
}

// giveTime bounds how long the new process may take to read what it is given.
const giveTime = time.Second

// give implements [vmm.Upgrade].Give.
func (s *successor) give(_ context.Context, kind string, n int, meta any, files []*os.File) error {
	// The guest may stand still, and the other process may not read.
	_ = s.conn.SetWriteDeadline(time.Now().Add(giveTime))
	defer s.conn.SetWriteDeadline(time.Time{})
	return s.conn.Send(fmt.Sprintf("%s %d", kind, n), meta, files...)
}

// lines implements [vmm.Upgrade].Lines.
func (s *successor) lines() (any, []*os.File, error) {
	var states lineStates
	var files []*os.File
	for _, l := range []struct {
		b  serial.Backend
		to **serial.Parked
	}{{s.p.serial, &states.Serial}, {s.p.console, &states.Console}} {
		if l.b == nil {
			continue
		}
		parked, f, err := serial.Park(l.b)
		if err != nil {
			return nil, files, err
		}
		if *l.to = parked; f != nil {
			files = append(files, f)
		}
	}
	return states, files, nil
}

// left is called when the new process has the guest: what both have is that one's from now
// on.
func (s *successor) left() {
	p := s.p
	p.claim.Leave()
	for _, l := range []serial.Backend{p.serial, p.console} {
		if l != nil {
			serial.Leave(l)
		}
	}
	if p.stays() {
		for _, l := range p.kept {
			l.kept.Store(true)
		}
		p.signals = make(chan os.Signal, 8)
		signal.Notify(p.signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	}
	p.heir.Store(s)
	p.notify.say(fmt.Sprintf("MAINPID=%d", s.hello.PID))
	p.say("%s goes on in process %d (govmm %s)", p.claim.Name(), s.hello.PID, s.hello.Version)
}

// giveUp ends what there is with a process that has not taken the guest over.
func (s *successor) giveUp() {
	s.startOnce.Do(func() { // it was never dialled
		s.startErr = errors.New("the upgrade has ended")
		close(s.ready)
	})
	close(s.over)
	s.drop()
	<-s.ready // a greeting that is under way ends by its deadline
	if s.conn != nil {
		_ = s.conn.Close()
	}
	if s.relay != nil {
		_ = s.relay.Close()
	}
	s.word.close()
}

// drop closes a connection that nobody has taken.
func (s *successor) drop() {
	select {
	case c := <-s.connected:
		if c != nil {
			_ = c.Close()
		}
	default:
	}
}

func dup(f *os.File) (*os.File, error) {
	fd, err := dupFD(f)
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
