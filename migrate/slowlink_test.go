package migrate

import (
	"context"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// slowNet is a network in memory, for tests in a bubble of synctest: its time is that of
// the bubble. All connections share one line in each direction, as over one cable.
type slowNet struct {
	buffer   int // bytes that each end of a connection buffers in each direction
	conns    chan net.Conn
	closed   chan struct{}
	once     sync.Once
	carriers sync.WaitGroup
	there    line // from those who dial
	back     line
	// lose is asked for each chunk; the connection whose chunk it wants lost never
	// delivers anything more in that direction. nil: nothing is lost.
	lose func(dialled int, back bool, chunk []byte) bool

	dialMu  sync.Mutex // guards dialled
	dialled int
}

func newSlowNet(bytesASecond, buffer int) *slowNet {
	n := &slowNet{buffer: buffer, conns: make(chan net.Conn), closed: make(chan struct{})}
	n.there.rate, n.back.rate = bytesASecond, bytesASecond
	return n
}

func (n *slowNet) Dial(ctx context.Context, _ string) (net.Conn, error) {
	a, b := &slowConn{in: newPipeEnd(n.buffer)}, &slowConn{in: newPipeEnd(n.buffer)}
	a.out, b.out = newPipeEnd(n.buffer), newPipeEnd(n.buffer)
	n.dialMu.Lock()
	number := n.dialled
	n.dialled++
	n.dialMu.Unlock()
	lost := func(back bool) func([]byte) bool {
		return func(p []byte) bool { return n.lose != nil && n.lose(number, back, p) }
	}
	n.carriers.Go(func() { n.there.carry(a.out, b.in, lost(false)) })
	n.carriers.Go(func() { n.back.carry(b.out, a.in, lost(true)) })
	select {
	case n.conns <- b:
		return a, nil
	case <-n.closed:
	case <-ctx.Done():
	}
	a.Close()
	b.Close()
	return nil, net.ErrClosed
}

func (n *slowNet) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

func (n *slowNet) Close() error {
	n.once.Do(func() { close(n.closed) })
	return nil
}

func (n *slowNet) Addr() net.Addr { return &net.UnixAddr{Name: "slow", Net: "memory"} }

// line carries chunks one after another.
type line struct {
	rate int // bytes a second
	mu   sync.Mutex
	free time.Time
}

func (l *line) pass(n int) {
	l.mu.Lock()
	now := time.Now()
	if l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(n) * time.Second / time.Duration(l.rate))
	at := l.free
	l.mu.Unlock()
	time.Sleep(at.Sub(now))
}

// carry moves bytes from one end's buffer to the other's.
func (l *line) carry(from, to *pipeEnd, lost func([]byte) bool) {
	defer to.finish()
	chunk := make([]byte, 1448)
	for {
		n, err := from.read(chunk)
		if err != nil {
			return
		}
		if lost(chunk[:n]) {
			from.await() // for its end
			to.await()
			return
		}
		l.pass(n + 52) // with the headers of IP and TCP
		if _, err := to.write(chunk[:n]); err != nil {
			from.close()
			return
		}
	}
}

// pipeEnd is a buffer with deadlines.
type pipeEnd struct {
	mu          sync.Mutex
	changed     *sync.Cond
	buf         []byte
	room        int
	last        bool // nothing more comes
	gone        bool
	read0, wri0 time.Time // deadlines
}

func newPipeEnd(room int) *pipeEnd {
	p := &pipeEnd{room: room}
	p.changed = sync.NewCond(&p.mu)
	return p
}

func (p *pipeEnd) read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.gone:
			return 0, net.ErrClosed
		case past(p.read0):
			return 0, os.ErrDeadlineExceeded
		case len(p.buf) > 0:
			n := copy(b, p.buf)
			p.buf = p.buf[n:]
			p.changed.Broadcast()
			return n, nil
		case p.last:
			return 0, io.EOF
		}
		p.changed.Wait()
	}
}

func (p *pipeEnd) write(b []byte) (done int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(b) > 0 {
		switch room := p.room - len(p.buf); {
		case p.gone || p.last:
			return done, net.ErrClosed
		case past(p.wri0):
			return done, os.ErrDeadlineExceeded
		case room > 0:
			n := min(room, len(b))
			p.buf = append(p.buf, b[:n]...)
			b, done = b[n:], done+n
			p.changed.Broadcast()
			continue
		}
		p.changed.Wait()
	}
	return done, nil
}

// finish lets what is buffered be read; close does not.
func (p *pipeEnd) finish() { p.set(func() { p.last = true }) }
func (p *pipeEnd) close()  { p.set(func() { p.gone = true }) }

func (p *pipeEnd) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	p.changed.Broadcast()
}

// await returns when the end is closed.
func (p *pipeEnd) await() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.gone && !p.last {
		p.changed.Wait()
	}
}

func past(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (p *pipeEnd) deadline(at *time.Time, t time.Time) {
	p.set(func() { *at = t })
	if !t.IsZero() {
		time.AfterFunc(time.Until(t), func() { p.set(func() {}) })
	}
}

// slowConn is one end of a connection.
type slowConn struct{ in, out *pipeEnd }

func (c *slowConn) Read(b []byte) (int, error)  { return c.in.read(b) }
func (c *slowConn) Write(b []byte) (int, error) { return c.out.write(b) }
func (c *slowConn) Close() error {
	c.out.finish()
	c.in.close()
	return nil
}
func (c *slowConn) LocalAddr() net.Addr  { return &net.UnixAddr{Name: "slow", Net: "memory"} }
func (c *slowConn) RemoteAddr() net.Addr { return &net.UnixAddr{Name: "slow", Net: "memory"} }
func (c *slowConn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}
func (c *slowConn) SetReadDeadline(t time.Time) error {
	c.in.deadline(&c.in.read0, t)
	return nil
}
func (c *slowConn) SetWriteDeadline(t time.Time) error {
	c.out.deadline(&c.out.wri0, t)
	return nil
}
