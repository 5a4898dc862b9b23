package simtest

import (
	"context"
	"net"
	"sync"
)

// Listener is a net.Listener in memory: what is dialled is one end of a net.Pipe,
// and what is accepted the other. Nothing is buffered in between.
type Listener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// Listen makes a listener.
func Listen() *Listener {
	return &Listener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

// Dial connects to the listener, whatever the address: it is for
// [migrate.Options.Dial].
func (l *Listener) Dial(ctx context.Context, _ string) (net.Conn, error) {
	a, b := net.Pipe()
	select {
	case l.conns <- b:
		return a, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Accept implements net.Listener, as do the next two.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close ends Accept. Connections stay open.
func (l *Listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr names what a pipe names as its address.
func (l *Listener) Addr() net.Addr {
	a, _ := net.Pipe()
	return a.LocalAddr()
}
