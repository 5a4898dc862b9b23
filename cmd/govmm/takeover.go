package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/govmm/govmm/internal/fdpass"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/sandbox"
	"github.com/govmm/govmm/vmm/serial"
	"golang.org/x/sys/unix"
)

// takeOverCheck is the argument with which the command asks a binary what it is.
const takeOverCheck = "--check"

// checkAnswer is what it says.
func checkAnswer() string { return fmt.Sprintf("govmm-take-over %d %s", takeOverProtocol, version()) }

// taking is what a process that takes a guest over has of the one before.
type taking struct {
	before  *fdpass.Held // the socket to it
	word    *word
	welcome welcome
	files   []*os.File // of the lines, until they are opened
	inbox   *inbox
	conns   *passedConns
	started chan struct{} // closed when the guest runs here
}

// takeOverMain is the process that takes a guest over: govmm __take-over SOCKET SANDBOX. What
// it prints before it has the other process's stderr goes to the command that started it.
func takeOverMain(args []string, stdout io.Writer) int {
	if len(args) == 1 && args[0] == takeOverCheck {
		_, _ = fmt.Fprintln(stdout, checkAnswer())
		return exitDone
	}
	if len(args) != 2 {
		_, _ = fmt.Fprintln(os.Stderr, "govmm: this is for govmm upgrade")
		return exitUsage
	}
	signal.Ignore(syscall.SIGPIPE, syscall.SIGXFSZ)
	conn, err := fdpass.FromFile(os.NewFile(takeOverSocket, "socket"))
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "govmm: "+err.Error())
		return exitFailed
	}
	status, err := takeGuest(conn, os.NewFile(takeOverRecord, "record"), args[0], args[1])
	if err != nil {
		_ = conn.Send(msgRefuse, refuseMsg{strings.ReplaceAll(err.Error(), "\n", "; ")}) // it may be gone
		return exitFailed
	}
	return status
}

// takeGuest takes the guest over and runs it to its end. After an error the guest never ran
// here.
func takeGuest(conn *fdpass.Conn, recorded *os.File, socket, sandboxMode string) (status int, err error) {
	text, err := api.ReadRecord(recorded)
	if err != nil {
		return 0, err
	}
	r, f, devices, err := readRecord(text)
	if err != nil {
		return 0, err
	}
	f.sandbox, f.socket = sandboxMode, socket
	if _, err := sandbox.ParseMode(f.sandbox); err != nil {
		return 0, err
	}
	p := &process{cmd: r.command(), flags: &f, line: &progressLine{}, taking: &taking{before: fdpass.NewHeld(conn), started: make(chan struct{})}}
	if err := p.beWelcome(r.Name, recorded); err != nil {
		return 0, err
	}
	p.log = newLog(terminalWriter(p.stderr))
	defer flushLog(p.log)
	ctx, quit := context.WithCancel(context.Background())
	defer quit()
	p.quit = quit
	p.taking.inbox, p.taking.conns = newInbox(), newPassedConns()
	go p.taking.listen(p)
	defer p.claim.Release()

	mayBoot := firstDisk(devices) != nil || r.TrustPaths
	outcome, err := p.run(ctx, &f, func(h host) (*vmm.VM, error) {
		reader, err := readerFor(mayBoot)
		if err != nil {
			return nil, err
		}
		return vmm.NewReceiver(vmm.ReceiveConfig{Name: h.name, Listener: p.taking.conns, Serial: h.serial, Console: h.console,
			Devices: devices, AllowSourcePaths: r.TrustPaths, Tracking: machine.DirtyTracking(f.tracking), Overcommit: f.overcommit, DiskReader: reader, Log: h.log,
			Inherit: &vmm.Inheritance{Take: p.taking.inbox.take, Lines: p.inheritLines, Claim: p.taking.word.claim, Here: p.here}})
	}, func() ([]virtio.Spec, sandbox.Policy) { return nil, heirPolicy(devices, r.TrustPaths) })
	select {
	case <-p.taking.started:
	default:
		return 0, errors.Join(errors.New("the guest did not come"), err)
	}
	if p.heir.Load() != nil { // it has gone on
		return exitDone, nil
	}
	status = exitDone
	switch {
	case err != nil:
		p.log.Error(fmt.Sprintf("%s: %v", p.claim.Name(), err))
		status = exitFailed
	case outcome.Kind == vmm.Crashed:
		p.log.Error(fmt.Sprintf("%s: the guest crashed: %s", p.claim.Name(), outcome.Text))
		status = exitFailed
	default:
		p.say("%s: %s", p.claim.Name(), outcome.Text)
	}
	flushLog(p.log) // before the one that is watched ends
	p.farewell(status)
	return status, nil
}

// farewell tells the attendant how this process ends.
func (p *process) farewell(status int) {
	if p.attendant != nil {
		_ = p.attendant.Send(msgExit, exitMsg{status}) // it may have been killed
	}
}

// heirPolicy is what the VM needs of its host while it runs here: what it has open it has
// got.
func heirPolicy(devices []virtio.Spec, trust bool) sandbox.Policy {
	policy := laterOf(devices, true) // they are opened when the guest comes, as far as they are not passed
	policy.Keep = nil                // taps are
	policy.Kill = firstDisk(devices) != nil || trust
	if trust {
		policy.AllFiles, policy.Listen, policy.Netlink = true, true, true
	}
	return policy
}

// beWelcome says hello and takes what the process before passes.
func (p *process) beWelcome(name string, recorded *os.File) error {
	t := p.taking
	if err := t.before.Send(msgHello, hello{takeOverProtocol, version(), os.Getpid()}); err != nil {
		return err
	}
	_ = t.before.SetReadDeadline(time.Now().Add(startTime))
	m, err := t.before.Conn.Receive()
	if err != nil {
		return fmt.Errorf("wait for the process before: %w", err)
	}
	_ = t.before.SetReadDeadline(time.Time{})
	files := m.Files
	defer func() {
		if err != nil {
			virtio.CloseFiles(files)
		}
	}()
	if m.Kind != msgWelcome {
		return fmt.Errorf("expected %s of the process before, found %.40q", msgWelcome, m.Kind)
	}
	w := &t.welcome
	if err = m.Decode(w); err != nil {
		return err
	}
	want := 5 + w.Serial.files() + w.Console.files()
	for _, more := range []bool{w.Attendant, w.Notify} {
		if more {
			want++
		}
	}
	if len(files) != want {
		err = fmt.Errorf("%d descriptors of the process before, expected %d", len(files), want)
		return err
	}
	next := func() *os.File {
		f := files[0]
		files = files[1:]
		return f
	}
	if err = machine.AdoptKVM(next()); err != nil {
		return err
	}
	if t.word, err = openWord(next()); err != nil {
		return err
	}
	claimed := files[:2]
	files = files[2:]
	if p.claim, err = api.Inherit(p.flags.socket, name, recorded, claimed); err != nil {
		return err
	}
	stderr := next()
	fd, err := fdpass.Number(stderr)
	if err == nil {
		err = unix.Dup3(fd, 2, 0) // for what the runtime prints
	}
	if err != nil {
		return err
	}
	p.stderr = stderr
	if w.Attendant {
		c, cerr := fdpass.FromFile(next())
		if err = cerr; err != nil {
			return err
		}
		p.attendant = fdpass.NewHeld(c)
	} else if w.Attended {
		p.attendant = t.before
	}
	if w.Notify {
		p.notify = &notifier{next()}
	}
	t.files, files = files, nil
	return nil
}

// openPassed opens the other ends of the guest's lines: those that are passed, and the others
// anew.
func (p *process) openPassed(h *host) error {
	t := p.taking
	open := func(spec string, kind lineKind) (serial.Backend, error) {
		files := t.files[:kind.files()]
		t.files = t.files[len(files):]
		switch kind {
		case lineUnix:
			return serial.InheritUnix(spec, files[0])
		case lineStdio:
			if spec != "stdio" {
				return nil, fmt.Errorf("%.80q: stdio was passed for it", spec)
			}
			p.stdin, p.stdout = files[0], files[1]
			return serial.OpenBackend("stdio", serial.Options{Quit: p.quit, Stdin: p.stdin, Stdout: p.stdout, Stderr: p.stderr,
				Watcher: []string{"/proc/self/exe", watchTerminal}})
		}
		return serial.OpenBackend(spec, serial.Options{})
	}
	var err error
	if h.serial, err = open(p.flags.serial, t.welcome.Serial); err != nil || p.flags.console == "none" {
		return err
	}
	if h.console, err = open(p.flags.console, t.welcome.Console); err != nil {
		return errors.Join(err, h.serial.Close())
	}
	return nil
}

// inheritLines implements [vmm.Inheritance].Lines.
func (p *process) inheritLines(ctx context.Context, n int) error {
	var states lineStates
	files, err := p.taking.inbox.take(ctx, vmm.GiveLines, n, &states)
	if err != nil {
		return err
	}
	for _, l := range []struct {
		b  serial.Backend
		to *serial.Parked
	}{{p.serial, states.Serial}, {p.console, states.Console}} {
		b, ok := l.b.(*serial.Inherited)
		if !ok || l.to == nil {
			continue
		}
		var conn *os.File
		if l.to.Client && len(files) > 0 {
			conn, files = files[0], files[1:]
		}
		err = errors.Join(err, b.GoOn(l.to, conn))
	}
	virtio.CloseFiles(files)
	return err
}

// here is called when the guest runs here: what both processes have is this one's.
func (p *process) here() {
	p.claim.Own()
	for _, l := range []serial.Backend{p.serial, p.console} {
		if b, ok := l.(*serial.Inherited); ok {
			b.Begin()
		}
	}
	close(p.taking.started)
	if p.attendant != nil && p.attendant != p.taking.before {
		go p.heed(p.attendant)
	}
}

// hasStarted reports whether the guest runs here, or has.
func (t *taking) hasStarted() bool {
	select {
	case <-t.started:
		return true
	default:
		return false
	}
}

// listen takes what the process before says: it gives what it has, and, if it stays as the
// attendant, passes on signals.
func (t *taking) listen(p *process) {
	defer t.inbox.end()
	for {
		m, err := t.before.Receive()
		if err != nil {
			if !t.hasStarted() || p.attendant == t.before {
				p.lost(err)
			}
			return
		}
		switch m.Kind {
		case msgConn:
			t.conns.add(m.Files)
		case msgSignal, msgQuit:
			p.told(m)
			m.Close()
		default:
			t.inbox.put(m)
		}
	}
}

// heed does what the attendant says.
func (p *process) heed(a *fdpass.Held) {
	for {
		m, err := a.Receive()
		if err != nil {
			p.lost(err)
			return
		}
		p.told(m)
		m.Close()
	}
}

// lost ends this process: the one that somebody watches has ended, as this one would have
// been ended in its place; or the process before, without the guest having come.
func (p *process) lost(err error) {
	if p.heir.Load() != nil {
		return
	}
	if p.taking.hasStarted() {
		p.log.Error(fmt.Sprintf("%s: the process that was watched in its place has ended, so this one ends: %v", p.claim.Name(), err))
	}
	p.quit()
}

// told does what the attendant has said.
func (p *process) told(m fdpass.Message) {
	var s signalMsg
	switch {
	case m.Kind == msgQuit:
		p.quit()
	case m.Kind == msgSignal && m.Decode(&s) == nil:
		switch n := syscall.Signal(s.Signal); n {
		case syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP:
			_ = syscall.Kill(os.Getpid(), n)
		}
	}
}

// inbox keeps what was given until it is taken.
type inbox struct {
	mu    sync.Mutex // guards the fields below
	over  bool
	came  chan struct{} // closed, and replaced, when something has come
	given map[string]fdpass.Message
}

func newInbox() *inbox { return &inbox{came: make(chan struct{}), given: map[string]fdpass.Message{}} }

// put keeps a message; of a kind only the last one.
func (b *inbox) put(m fdpass.Message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	kind, _, _ := strings.Cut(m.Kind, " ")
	for k, old := range b.given {
		if before, _, _ := strings.Cut(k, " "); before == kind {
			old.Close()
			delete(b.given, k)
		}
	}
	if b.over || kind != vmm.GiveHeirloom && kind != vmm.GiveLines {
		m.Close()
		return
	}
	b.given[m.Kind] = m
	close(b.came)
	b.came = make(chan struct{})
}

func (b *inbox) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	for _, m := range b.given {
		m.Close()
	}
	clear(b.given)
	close(b.came)
	b.came = make(chan struct{})
}

// take implements [vmm.Inheritance].Take.
func (b *inbox) take(ctx context.Context, kind string, n int, meta any) ([]*os.File, error) {
	name := fmt.Sprintf("%s %d", kind, n)
	for {
		b.mu.Lock()
		m, ok := b.given[name]
		delete(b.given, name)
		came, over := b.came, b.over
		b.mu.Unlock()
		switch {
		case ok:
			if err := m.Decode(meta); err != nil {
				m.Close()
				return nil, err
			}
			return m.Files, nil
		case over:
			return nil, errors.New("the process before has ended")
		}
		select {
		case <-came:
		case <-ctx.Done():
			return nil, fmt.Errorf("the process before has not given its %s: %w", name, ctx.Err())
		}
	}
}

// passedConns is the listener of the connections that the process before passes.
type passedConns struct {
	queue  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPassedConns() *passedConns {
	return &passedConns{queue: make(chan net.Conn, 64), closed: make(chan struct{})}
}

func (l *passedConns) add(files []*os.File) {
	for _, f := range files {
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			continue
		}
		select {
		case l.queue <- c:
		default:
			_ = c.Close()
		}
	}
}

// Accept implements [net.Listener].
func (l *passedConns) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (l *passedConns) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements [net.Listener].
func (l *passedConns) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: "the process before"} }
