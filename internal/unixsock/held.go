package unixsock

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// Held is a [Listener] that can stop for a while: connections wait in the kernel, and
// another process that has the socket may take them.
type Held struct {
	*Listener
	turn    sync.Mutex // guards all below
	held    bool
	closed  bool
	changed sync.Cond
	taking  int // calls of Accept that may take a connection
	open    int // connections that Accept has returned and nobody has closed
}

// NewHeld returns a Held over a listener.
func NewHeld(ln *Listener) *Held {
	l := &Held{Listener: ln}
	l.changed.L = &l.turn
	return l
}

// heldConn is a connection that its listener counts.
type heldConn struct {
	*net.UnixConn
	l    *Held
	once sync.Once
}

// Close implements [net.Conn].
func (c *heldConn) Close() error {
	err := c.UnixConn.Close()
	c.Detach()
	return err
}

// Detach returns the connection itself, which its listener does not count any more.
func (c *heldConn) Detach() *net.UnixConn {
	c.once.Do(func() {
		c.l.turn.Lock()
		defer c.l.turn.Unlock()
		c.l.open--
		c.l.changed.Broadcast()
	})
	return c.UnixConn
}

// Bare returns the unix connection that a [Held] has accepted, uncounted; nil: it is none.
func Bare(c net.Conn) *net.UnixConn {
	switch c := c.(type) {
	case *heldConn:
		return c.Detach()
	case *net.UnixConn:
		return c
	}
	return nil
}

// Drain waits until all connections are closed that Accept has returned, or for so long.
func (l *Held) Drain(most time.Duration) {
	over := false
	timer := time.AfterFunc(most, func() {
		l.turn.Lock()
		defer l.turn.Unlock()
		over = true
		l.changed.Broadcast()
	})
	defer timer.Stop()
	l.turn.Lock()
	defer l.turn.Unlock()
	for !over && l.open > 0 {
		l.changed.Wait()
	}
}

// Accept implements [net.Listener].
func (l *Held) Accept() (net.Conn, error) {
	for {
		l.turn.Lock()
		for l.held && !l.closed {
			l.changed.Wait()
		}
		l.taking++
		l.turn.Unlock()
		c, err := l.AcceptUnix()
		l.turn.Lock()
		l.taking--
		if err == nil {
			l.open++
		}
		again := errors.Is(err, os.ErrDeadlineExceeded) && !l.closed
		l.changed.Broadcast()
		l.turn.Unlock()
		if err == nil {
			return &heldConn{UnixConn: c, l: l}, nil
		}
		if !again {
			return nil, err
		}
	}
}

// Hold makes Accept take no connection, and returns when none is being taken.
func (l *Held) Hold() {
	l.turn.Lock()
	defer l.turn.Unlock()
	l.held = true
	_ = l.SetDeadline(time.Unix(1, 0)) // of one that is closed nobody waits
	for l.taking > 0 {
		l.changed.Wait()
	}
}

// Continue undoes Hold.
func (l *Held) Continue() {
	l.turn.Lock()
	defer l.turn.Unlock()
	l.held = false
	_ = l.SetDeadline(time.Time{})
	l.changed.Broadcast()
}

// Close implements [net.Listener].
func (l *Held) Close() error {
	l.turn.Lock()
	l.closed = true
	l.changed.Broadcast()
	l.turn.Unlock()
	return l.Listener.Close()
}
