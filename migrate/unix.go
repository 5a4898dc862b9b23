package migrate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"

	"github.com/govmm/govmm/internal/unixsock"
)

// ListenUnix makes a unix socket of mode 0600 at path for a [Receiver], which vanishes
// when it is closed. A socket there that nobody listens on is replaced. The listener's
// address is unix:PATH, with an absolute path, as [New] takes it.
func ListenUnix(path string) (net.Listener, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	ln, err := unixsock.Listen(path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s%s: %w", UnixPrefix, path, err)
	}
	return unixListener{ln, unixAddr(UnixPrefix + path)}, nil
}

type unixListener struct {
	*unixsock.Listener
	addr unixAddr
}

// Addr implements [net.Listener].
func (l unixListener) Addr() net.Addr { return l.addr }

// unixAddr is unix:PATH.
type unixAddr string

func (a unixAddr) Network() string { return "unix" }
func (a unixAddr) String() string  { return string(a) }

// dialUnix connects to the receiver that listens at path, if that may be talked to.
func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	c, err := unixsock.Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	if err := checkUnixPeer(c); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// checkUnixPeer refuses a process of another user, root excepted, at the other end of a
// unix socket.
func checkUnixPeer(c net.Conn) error {
	if u, ok := c.(*net.UnixConn); ok {
		return unixsock.CheckPeer(u)
	}
	return nil
}

// peerOf is the address of a peer. One at a unix socket has none: it is its process.
func peerOf(c net.Conn) net.Addr {
	if u, ok := c.(*net.UnixConn); ok {
		if cred, err := unixsock.Peer(u); err == nil {
			return unixAddr(fmt.Sprintf("%spid=%d", UnixPrefix, cred.Pid))
		}
	}
	return c.RemoteAddr()
}
