package migrate

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// A data channel over TLS is a sequence of connections, each with a key of its own: before
// one has carried [keyLimit], the source opens the next one, whose hello has a flag, says
// RENEW on the old one, and goes on with the new one. The destination reads them one after
// the other. So what holds for the order of frames on a channel holds without a word about
// connections.

// lane is one data channel at the source.
type lane struct {
	number int // from 1

	connMu sync.Mutex // guards the fields below
	conn   *conn
	old    *conn  // the one before
	before uint64 // bytes that went out on earlier ones
}

func newLane(number int, c *conn) *lane { return &lane{number: number, conn: c} }

func (n *lane) current() *conn {
	n.connMu.Lock()
	defer n.connMu.Unlock()
	return n.conn
}

// sent is the number of bytes that went out.
func (n *lane) sent() uint64 {
	n.connMu.Lock()
	defer n.connMu.Unlock()
	return n.before + n.conn.flow.sent.Load()
}

func (n *lane) close() {
	n.connMu.Lock()
	defer n.connMu.Unlock()
	n.conn.Close()
	if n.old != nil {
		n.old.Close()
	}
}

// replace makes c the channel's connection.
func (n *lane) replace(c *conn) {
	n.connMu.Lock()
	defer n.connMu.Unlock()
	if n.old != nil {
		n.old.Close() // long read to its end
	}
	n.before += n.conn.flow.sent.Load()
	n.old, n.conn = n.conn, c
}

// sealed is the most that n bytes of a frame take on the wire: records are full, but for
// the last one of each large run of pages.
func sealed(n uint64) uint64 { return n + n/256 + 1<<10 }

// room returns the lane's connection, for a frame of n bytes: a new one if the current one
// must not carry that much more under its key. The lane belongs to the caller.
func (l *link) room(n *lane, bytes uint64) (*conn, error) {
	c := n.current()
	if c.lower == nil || c.flow.sent.Load()+sealed(bytes)+sealed(headerSize) <= c.lower.limit {
		return c, nil
	}
	next, err := l.dial(n.number, true)
	if err != nil {
		return nil, fmt.Errorf("data channel %d: renew its key: %w", n.number, err)
	}
	c.renewed.Store(true)
	n.replace(next)
	if l.ctx.Err() != nil {
		n.close() // whoever closes the lanes may have missed this one
		return nil, context.Cause(l.ctx)
	}
	l.pulse.add(next.flow)
	l.watchers.Go(func() { l.watch(n.number, next) })
	if err := c.writeFrame(header{typ: frameRenew}); err != nil {
		return nil, err
	}
	return next, nil
}

// renew takes the connection that follows the one on which RENEW came.
func (in *inlet) renew() error {
	s := in.session
	in.idle.Store(true)
	defer in.idle.Store(false)
	t := time.NewTimer(s.timeout)
	defer t.Stop()
	select {
	case c := <-in.next:
		s.dataMu.Lock()
		defer s.dataMu.Unlock()
		in.before += in.conn.flow.received.Load()
		s.pulse.drop(in.conn.flow)
		in.conn.Close()
		in.conn = c
		s.pulse.add(c.flow)
		if s.ended {
			c.interrupt()
		}
		return nil
	case <-s.over:
		return errSettled
	case <-t.C:
		return fmt.Errorf("the connection with the next key did not come within %v", s.timeout)
	}
}

// follow keeps a connection that will take the place of the channel's, until that has ended.
func (s *session) follow(number int, c *conn) (*inlet, error) {
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	if s.ended || number < 1 || number > len(s.inlets) || s.inlets[number-1] == nil {
		return nil, fmt.Errorf("%w: the next connection of data channel %d, which session %v does not have", ErrProtocol, number, s.id)
	}
	in := s.inlets[number-1]
	select {
	case in.next <- c:
		return in, nil
	default:
		return nil, fmt.Errorf("%w: two connections follow on that of data channel %d", ErrProtocol, number)
	}
}
