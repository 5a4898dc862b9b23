package serial

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/govmm/govmm/internal/unixsock"
	"github.com/govmm/govmm/virtio"
)

// A guest that goes on in another process of its host keeps the other ends of its lines.
// The socket of a backend unix:PATH is passed when the other process starts ([Listener]),
// its client and what no client has got yet when the guest stands still ([Park]). What a
// backend stdio stands on is for the process to pass. The others are opened anew.

// Parked is the state of a backend unix:PATH while the guest stands still.
type Parked struct {
	Client  bool   `json:"client"`  // a client is connected, and its connection is passed
	Mute    bool   `json:"mute"`    // it sends nothing more
	Backlog []byte `json:"backlog"` // what the next client gets first
}

// Listener duplicates the listening socket of a backend; nil: it has none.
func Listener(b Backend) (*os.File, error) {
	u, ok := unwrapped(b).(*unixSocket)
	if !ok {
		return nil, nil
	}
	return u.ln.UnixListener.File()
}

// Hold makes a backend take no new client until Continue, so that Park tells all of it.
func Hold(b Backend) {
	if u, ok := unwrapped(b).(*unixSocket); ok {
		u.ln.Hold()
	}
}

// Continue undoes Hold.
func Continue(b Backend) {
	if u, ok := unwrapped(b).(*unixSocket); ok {
		u.ln.Continue()
	}
}

// Park returns what another process needs to go on with a backend, whose output has been
// written; nil: it is opened anew. A client that does not read what it is sent stays here: it
// gets the rest of that, and then its connection ends.
func Park(b Backend) (*Parked, *os.File, error) {
	u, ok := unwrapped(b).(*unixSocket)
	if !ok {
		return nil, nil, nil
	}
	u.clientMu.Lock()
	defer u.clientMu.Unlock()
	p := &Parked{Backlog: u.backlog}
	c := u.client
	if c == nil || c.since.Load() != 0 {
		return p, nil, nil
	}
	select {
	case <-c.ready:
	default:
		return p, nil, nil
	}
	f, err := c.conn.File()
	if err != nil {
		return nil, nil, err
	}
	p.Client, p.Mute = true, c.mute
	return p, f, nil
}

// Leave makes Close of a backend leave what another process has taken over.
func Leave(b Backend) {
	if u, ok := unwrapped(b).(*unixSocket); ok {
		u.ln.Keep()
	}
}

// Inherited is a backend unix:PATH of another process of this host. Until Begin that one
// takes its clients.
type Inherited struct {
	*unixSocket
	begun bool // guarded by clientMu
}

// InheritUnix makes the backend unix:PATH around the socket that Listener has returned in
// another process. Close leaves the path until Begin was called. It takes the file over, also
// if it fails.
func InheritUnix(spec string, listener *os.File) (*Inherited, error) {
	path, ok := strings.CutPrefix(spec, "unix:")
	if !ok {
		_ = listener.Close()
		return nil, fmt.Errorf("%.80q: a socket was passed for it", spec)
	}
	path, err := virtio.Absolute(path)
	if err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	ln, err := unixsock.Adopt(listener, path)
	if err != nil {
		return nil, err
	}
	return &Inherited{unixSocket: newUnix(path, ln)}, nil
}

// GoOn sets what Park has returned in the other process. It takes the file over.
func (b *Inherited) GoOn(p *Parked, connection *os.File) error {
	var c *client
	if connection != nil {
		nc, err := net.FileConn(connection)
		if err = errors.Join(err, connection.Close()); err != nil {
			return fmt.Errorf("serial port on %s: take over its client: %w", b.path, err)
		}
		conn, ok := nc.(*net.UnixConn)
		if !ok {
			return errors.Join(fmt.Errorf("serial port on %s: its client is no unix socket", b.path), nc.Close())
		}
		c = newClient(conn)
		c.mute = p.Mute
		close(c.ready)
	}
	b.clientMu.Lock()
	defer b.clientMu.Unlock()
	if old := b.client; old != nil { // of a stop that was undone
		_ = old.conn.Close()
	}
	b.backlog = append([]byte(nil), p.Backlog[:min(len(p.Backlog), maxBacklog)]...)
	b.set(c)
	return nil
}

// Begin takes clients from now on.
func (b *Inherited) Begin() {
	b.clientMu.Lock()
	b.begun = true
	b.clientMu.Unlock()
	b.begin()
}

// Close implements [Backend].
func (b *Inherited) Close() error {
	b.clientMu.Lock()
	begun := b.begun
	b.clientMu.Unlock()
	if !begun {
		b.ln.Keep()
	}
	return b.unixSocket.Close()
}

// unwrapped is the backend itself.
func unwrapped(b Backend) Backend {
	if i, ok := b.(*Inherited); ok {
		return i.unixSocket
	}
	return b
}

// Yielder is a backend that can end all calls under way, and be used again: what Close does,
// without the end.
type Yielder interface{ Yield() }

var _ Yielder = (*stdio)(nil)

// Yield implements [Yielder].
func (b *stdio) Yield() {
	if b.closed.Swap(true) {
		return
	}
	signalEvent(b.wakeIn)
	signalEvent(b.wakeOut)
	b.inUse.Lock()
	defer b.inUse.Unlock()
	b.closed.Store(false)
}
