package net

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/internal/netproc"
)

// stream is a [Backend] whose frames go to another process over a stream socket. When the
// other end goes away the guest's link is down until there is another one: nobody but this
// end can know where the next frame begins, so each connection begins with a frame.
//
// A stream has as many ports as the guest has queue pairs. Frames arrive at the first.
type stream struct {
	name     string
	log      *slog.Logger
	headers  bool // each frame has its struct virtio_net_hdr; otherwise there is none to leave work to
	offloads uint64
	dial     func(streamState) (*wire, error)
	ports    []*streamPort

	links   sync.Mutex // guards all below
	state   streamState
	current *wire         // nil: none
	changed chan struct{} // closed when current is another one
	onLink  func(up bool)
	stop    context.CancelFunc // of redial; nil: it does not run
	ended   sync.WaitGroup
}

// streamState is what the other end of a new connection is told.
type streamState struct {
	guest uint64 // Guest features that the guest accepts now
	taken bool   // this process has the right to run the guest
}

// wire is one connection.
type wire struct {
	conn streamConn
	in   *netproc.Reader
	out  *netproc.Writer
	// tell tells the other end of a new state; nil: it need not know.
	tell  func(streamState) error
	down  chan struct{} // closed when the connection has failed
	once  sync.Once
	cause error // set before down is closed
}

// streamConn is a *net.UnixConn or an *os.File.
type streamConn interface {
	netproc.Conn
	SetReadDeadline(time.Time) error
}

// maxWaiting is how many bytes of frames wait for the other end. It is more than the
// window of one connection through the user network.
const maxWaiting = 4 << 20

// newWire makes a wire of a connection, which it takes over.
func newWire(c streamConn, headers bool) (_ *wire, err error) {
	w := &wire{conn: c, down: make(chan struct{})}
	extra := 0
	if headers {
		extra = HeaderBytes
	}
	if w.in, err = netproc.NewReader(c, extra+etherHeader, extra+maxFrame); err == nil {
		w.out, err = netproc.NewWriter(c, maxWaiting)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return w, nil
}

// fail ends the connection.
func (w *wire) fail(err error) {
	w.once.Do(func() {
		w.cause = err
		close(w.down)
	})
}

// streamPort is one queue of a stream.
type streamPort struct {
	s           *stream
	first       bool
	interrupted atomic.Bool
	poke        chan struct{} // has a value after Interrupt
}

func newStream(name string, queues int, log *slog.Logger) *stream {
	s := &stream{name: name, log: log, changed: make(chan struct{})}
	for i := range queues {
		s.ports = append(s.ports, &streamPort{s: s, first: i == 0, poke: make(chan struct{}, 1)})
	}
	return s
}

// Name is the name for users.
func (s *stream) Name() string { return s.name }

// Ports are the queues.
func (s *stream) Ports() (ports []Port) {
	for _, p := range s.ports {
		ports = append(ports, p)
	}
	return ports
}

// Offloads are those that the other end does.
func (s *stream) Offloads() uint64 { return s.offloads }

// SetOffloads tells the other end what the guest accepts. One that does not hear it is
// replaced by one that does.
func (s *stream) SetOffloads(guest uint64) error {
	if err := s.set(func(st *streamState) { st.guest = guest }); err != nil {
		if w, _ := s.wire(); w != nil {
			w.fail(err)
		}
	}
	return nil
}

// set changes the state. A connection that cannot be told of it fails, and the next one is.
func (s *stream) set(change func(*streamState)) error {
	s.links.Lock()
	before := s.state
	change(&s.state)
	state, w := s.state, s.current
	s.links.Unlock()
	if w == nil || w.tell == nil || state == before {
		return nil
	}
	return w.tell(state)
}

// take sets whether this process has the right to run the guest. After an error it is as
// it was before.
func (s *stream) take(taken bool) error {
	err := s.set(func(st *streamState) { st.taken = taken })
	if err != nil {
		s.links.Lock()
		s.state.taken = !taken
		s.links.Unlock()
		err = fmt.Errorf("%s: %w", s.name, err)
	}
	return err
}

// SetPairs does nothing: frames arrive at the first port.
func (s *stream) SetPairs(int) error { return nil }

// OnLink has f called when the connection goes away or is there again. f must not call
// methods of the stream but those of ports.
func (s *stream) OnLink(f func(up bool)) {
	s.links.Lock()
	defer s.links.Unlock()
	s.onLink = f
}

// connect makes the first connection, and keeps one from then on. To connect again does
// nothing.
func (s *stream) connect() error {
	s.links.Lock()
	state, running := s.state, s.stop != nil
	s.links.Unlock()
	if running {
		return nil
	}
	w, err := s.dial(state)
	if err != nil {
		return fmt.Errorf("%s: %w", s.name, err)
	}
	s.use(w)
	ctx, stop := context.WithCancel(context.Background())
	s.links.Lock()
	s.stop = stop
	s.links.Unlock()
	s.ended.Go(func() { s.redial(ctx, w) })
	return nil
}

// disconnect ends the connection.
func (s *stream) disconnect() {
	s.links.Lock()
	stop := s.stop
	s.stop = nil
	s.links.Unlock()
	if stop != nil {
		stop()
		s.ended.Wait()
	}
}

// use makes w the connection that is used; nil: none.
func (s *stream) use(w *wire) {
	s.links.Lock()
	defer s.links.Unlock()
	s.current = w
	close(s.changed)
	s.changed = make(chan struct{})
}

// The pause between two attempts to connect grows from the first to the second.
const (
	redialSoon = 100 * time.Millisecond
	redialMost = 5 * time.Second
)

// redial replaces the connection whenever it fails, until ctx ends.
func (s *stream) redial(ctx context.Context, w *wire) {
	pause := redialSoon
	for {
		since := time.Now()
		select {
		case <-ctx.Done():
			s.use(nil)
			_ = w.conn.Close()
			return
		case <-w.down:
		}
		s.use(nil)
		_ = w.conn.Close()
		s.log.Warn("the connection is gone, the guest's link is down", "to", s.name, "err", w.cause)
		s.tellLink(false)
		if time.Since(since) > redialMost {
			pause = redialSoon
		}
		for w = nil; w == nil; {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			pause = min(2*pause, redialMost)
			w = s.again()
		}
		s.log.Info("connected again, the guest's link is up", "to", s.name)
		s.tellLink(true)
	}
}

// again connects; nil: it failed, or the state has changed meanwhile.
func (s *stream) again() *wire {
	s.links.Lock()
	state := s.state
	s.links.Unlock()
	w, err := s.dial(state)
	if err != nil {
		s.log.Debug("connect", "to", s.name, "err", err)
		return nil
	}
	s.links.Lock()
	same := state == s.state
	s.links.Unlock()
	if !same && w.tell != nil {
		_ = w.conn.Close()
		return nil
	}
	s.use(w)
	return w
}

func (s *stream) tellLink(up bool) {
	s.links.Lock()
	f := s.onLink
	s.links.Unlock()
	if f != nil {
		f(up)
	}
}

// Close ends the connection.
func (s *stream) Close() error {
	s.disconnect()
	return nil
}

// wire returns the connection, and what is closed when it is another one.
func (s *stream) wire() (*wire, <-chan struct{}) {
	s.links.Lock()
	defer s.links.Unlock()
	return s.current, s.changed
}

// Read implements [Port].
func (p *streamPort) Read(b []byte, idle func()) (int, error) {
	for {
		w, changed := p.s.wire()
		if p.interrupted.Load() {
			return 0, ErrInterrupted
		}
		if w == nil || !p.first {
			idle()
			select {
			case <-changed:
			case <-p.poke:
			}
			continue
		}
		frame, err := w.in.Next()
		if err == nil && frame != nil {
			return p.copy(b, frame), nil
		}
		if err == nil {
			err = w.in.Fill(idle)
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			w.fail(err)
			p.wait(changed)
		}
	}
}

// copy copies a frame, with an empty header if it has none.
func (p *streamPort) copy(b, frame []byte) int {
	if p.s.headers {
		return copy(b, frame)
	}
	clear(b[:HeaderBytes])
	return HeaderBytes + copy(b[HeaderBytes:], frame)
}

// wait waits for another connection, or Interrupt.
func (p *streamPort) wait(changed <-chan struct{}) {
	select {
	case <-changed:
	case <-p.poke:
	}
}

// Write implements [Port]. The frame may wait until Flush.
func (p *streamPort) Write(b []byte) error {
	w, _ := p.s.wire()
	if w == nil {
		return ErrDropped
	}
	if !p.s.headers {
		b = b[HeaderBytes:]
	}
	if err := w.out.Write(b); err != nil {
		if !errors.Is(err, netproc.ErrFull) {
			w.fail(err)
		}
		return ErrDropped
	}
	return nil
}

// Flush implements [flusher].
func (p *streamPort) Flush() {
	if w, _ := p.s.wire(); w != nil {
		if err := w.out.Flush(); err != nil {
			w.fail(err)
		}
	}
}

// Interrupt makes Read return.
func (p *streamPort) Interrupt() error {
	p.interrupted.Store(true)
	select {
	case p.poke <- struct{}{}:
	default:
	}
	if w, _ := p.s.wire(); w != nil && p.first {
		_ = w.conn.SetReadDeadline(time.Unix(1, 0)) // an error: it is closed
	}
	return nil
}

// Continue undoes Interrupt.
func (p *streamPort) Continue() error {
	p.interrupted.Store(false)
	select {
	case <-p.poke:
	default:
	}
	if w, _ := p.s.wire(); w != nil && p.first {
		_ = w.conn.SetReadDeadline(time.Time{})
	}
	return nil
}

// flusher is a [Port] whose Write collects frames.
type flusher interface {
	// Flush sends what was collected.
	Flush()
}

// flush sends what a port has collected.
func flush(p Port) {
	if f, ok := p.(flusher); ok {
		f.Flush()
	}
}

// lateConnect goes on trying to connect, after a first attempt has failed with err.
func (s *stream) lateConnect(err error) {
	w := &wire{conn: noConn{}, down: make(chan struct{})}
	w.fail(err)
	ctx, stop := context.WithCancel(context.Background())
	s.links.Lock()
	s.stop = stop
	s.links.Unlock()
	s.ended.Go(func() { s.redial(ctx, w) })
}

// noConn is the connection of a wire that never was.
type noConn struct{ streamConn }

// Close implements [netproc.Conn].
func (noConn) Close() error { return nil }
