package migrate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// dialer makes the connections of one migration, or of one probe: all of them to
// the same peer.
type dialer struct {
	address string // as the user wrote it
	dial    func(ctx context.Context, address string) (net.Conn, error)
	timeout time.Duration
	tls     *credentials // nil: connections are plain
	wrong   error        // with the credentials

	peerMu sync.Mutex // guards peer
	peer   string     // the address to dial, once a name has been resolved
}

func newDialer(address string, opt Options) *dialer {
	d := &dialer{address: address, dial: opt.Dial, timeout: opt.PeerTimeout}
	if opt.TLS != nil {
		d.tls, d.wrong = newCredentials(opt.TLS, address)
	}
	return d
}

// connect opens a connection and sends the hello.
func (d *dialer) connect(ctx context.Context, h hello) (*conn, error) {
	if d.wrong != nil {
		return nil, d.wrong
	}
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
	if err := d.secure(ctx, c); err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to %s: %w", d.address, err)
	}
	b := h.encode()
	_ = c.SetWriteDeadline(time.Now().Add(d.timeout)) // without one, the context's end closes the connection
	if _, err := c.Write(b[:]); err != nil {
		if c.lower != nil { // what the destination found wrong with this host may have come
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			if why := c.readFull(b[:1]); errors.Is(why, ErrRefused) {
				err = why
			}
		}
		c.Close()
		return nil, fmt.Errorf("send hello to %s: %w", d.address, err)
	}
	_ = c.SetWriteDeadline(time.Time{})
	return c, nil
}

// secure makes c a connection over TLS, if there are credentials, within the time-out.
func (d *dialer) secure(ctx context.Context, c *conn) error {
	if d.tls == nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.timeout, fmt.Errorf("the TLS handshake took more than %v", d.timeout))
	defer cancel()
	return d.tls.handshake(ctx, c)
}

// UnixPrefix begins an address that is the path of a unix socket.
const UnixPrefix = "unix:"

// CheckAddress reports whether the engine can dial address by itself: HOST:PORT, or
// unix:PATH with an absolute path.
func CheckAddress(address string) error {
	if path, ok := strings.CutPrefix(address, UnixPrefix); ok {
		const most = 4095 // PATH_MAX, with the final zero
		if !filepath.IsAbs(path) || len(path) > most || strings.ContainsRune(path, 0) {
			return fmt.Errorf("migrate to %.80q: expected %sPATH, with an absolute path", address, UnixPrefix)
		}
		return nil
	}
	if _, _, err := net.SplitHostPort(address); err != nil {
		return fmt.Errorf("migrate to %.80q: expected HOST:PORT or %sPATH", address, UnixPrefix)
	}
	return nil
}

func isUnix(address string) bool { return strings.HasPrefix(address, UnixPrefix) }

// open makes a connection. By default it is one of TCP, and the first one decides
// where the others go: a name may have several addresses, or another one a moment
// later.
func (d *dialer) open(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	if d.dial != nil {
		return d.dial(ctx, d.address)
	}
	if path, ok := strings.CutPrefix(d.address, UnixPrefix); ok {
		return dialUnix(ctx, path)
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
