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
}

// NewHeld returns a Held over a listener.
func NewHeld(ln *Listener) *Held {
	l := &Held{Listener: ln}
	l.changed.L = &l.turn
	return l
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
		c, err := l.Listener.Accept()
		l.turn.Lock()
		l.taking--
		again := errors.Is(err, os.ErrDeadlineExceeded) && !l.closed
		l.changed.Broadcast()
		l.turn.Unlock()
		if !again {
			return c, err
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
