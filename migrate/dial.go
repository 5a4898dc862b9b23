package migrate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// dialer makes the connections of one migration, or of one probe: all of them to
// the same peer.
type dialer struct {
	address string // as the user wrote it
	dial    func(ctx context.Context, address string) (net.Conn, error)
	timeout time.Duration

	peerMu sync.Mutex // guards peer
	peer   string     // the address to dial, once a name has been resolved
}

func newDialer(address string, opt Options) *dialer {
	return &dialer{address: address, dial: opt.Dial, timeout: opt.PeerTimeout}
}

// connect opens a connection and sends the hello.
func (d *dialer) connect(ctx context.Context, h hello) (*conn, error) {
	nc, err := d.open(ctx)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		if op := (*net.OpError)(nil); errors.As(err, &op) {
			err = op.Err // without the address, which the text has already
		}
		return nil, fmt.Errorf("connect to %s: %w", d.address, err)
	}
	c := newConn(nc)
	b := h.encode()
	_ = c.SetWriteDeadline(time.Now().Add(d.timeout)) // without one, the context's end closes the connection
	if _, err := c.Write(b[:]); err != nil {
		c.Close()
		return nil, fmt.Errorf("send hello to %s: %w", d.address, err)
	}
	_ = c.SetWriteDeadline(time.Time{})
	return c, nil
}

// open makes a connection. By default it is one of TCP, and the first one decides
// where the others go: a name may have several addresses, or another one a moment
// later.
func (d *dialer) open(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	if d.dial != nil {
		return d.dial(ctx, d.address)
	}
	d.peerMu.Lock()
	peer := d.peer
	d.peerMu.Unlock()
	if peer == "" {
		peer = d.address
	}
	nc, err := new(net.Dialer).DialContext(ctx, "tcp", peer)
	if err == nil {
		d.peerMu.Lock()
		d.peer = nc.RemoteAddr().String()
		d.peerMu.Unlock()
	}
	return nc, err
}
