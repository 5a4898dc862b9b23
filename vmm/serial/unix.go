package serial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/govmm/govmm/internal/unixsock"
	"github.com/govmm/govmm/virtio"
)

// maxBacklog is how many of the last bytes of output are kept while no client
// is connected. The next client gets them first.
const maxBacklog = 64 << 10

// stuckAfter is for how long a client takes no output before another one may have its
// place.
const stuckAfter = 10 * time.Second

// unixSocket is the backend unix:PATH, for one client at a time; another one gets a
// message and is disconnected, unless the first one is stuck: then that one is. While a
// client is connected and does not read, output waits. While no client is connected, the
// last maxBacklog bytes are kept.
type unixSocket struct {
	path     string
	patience atomic.Int64 // stuckAfter, except in tests
	ln       *unixsock.Held
	work     sync.WaitGroup // accept, and a sendBacklog for each client

	// clientMu guards all below.
	clientMu sync.Mutex
	client   *client       // nil: no client is connected
	changed  chan struct{} // closed, and replaced, when client changes
	backlog  []byte
	closed   bool
}

// client is a connection.
type client struct {
	conn  *net.UnixConn
	ready chan struct{} // closed when the client has got the backlog
	mute  bool          // the client has shut down its direction; guarded by clientMu
	since atomic.Int64  // when the Write under way began, in Unix nanoseconds; 0: none is
}

// write writes all of p, as long as it takes.
func (c *client) write(p []byte) (int, error) {
	c.since.Store(time.Now().UnixNano())
	defer c.since.Store(0)
	return c.conn.Write(p)
}

// stuck reports whether a Write has been under way for so long.
func (c *client) stuck(d time.Duration) bool {
	since := c.since.Load()
	return since != 0 && time.Since(time.Unix(0, since)) >= d
}

func openUnix(path string) (*unixSocket, error) {
	path, err := virtio.Absolute(path) // it is removed at the end
	if err != nil {
		return nil, err
	}
	ln, err := unixsock.Listen(path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	b := newUnix(path, ln)
	b.begin()
	return b, nil
}

func newUnix(path string, ln *unixsock.Listener) *unixSocket {
	b := &unixSocket{path: path, ln: unixsock.NewHeld(ln), changed: make(chan struct{})}
	b.patience.Store(int64(stuckAfter))
	return b
}

// begin takes connections from now on.
func (b *unixSocket) begin() {
	b.work.Add(1)
	go b.accept()
}

// accept takes connections until the listener is closed.
func (b *unixSocket) accept() {
	defer b.work.Done()
	for {
		nc, err := b.ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		conn := unixsock.Bare(nc)
		if err != nil || conn == nil {
			time.Sleep(100 * time.Millisecond) // probably out of file descriptors
			continue
		}
		if old := b.current(); old != nil && (hungUp(old.conn) || old.stuck(time.Duration(b.patience.Load()))) {
			b.drop(old, nil)
		}
		b.clientMu.Lock()
		if b.client != nil || b.closed {
			b.clientMu.Unlock()
			_, _ = conn.Write([]byte("govmm: another client has this serial port\r\n"))
			_ = conn.Close()
			continue
		}
		c := newClient(conn)
		backlog := b.backlog
		b.backlog = nil
		b.set(c)
		b.work.Add(1)
		b.clientMu.Unlock()
		go b.sendBacklog(c, backlog)
	}
}

// sendBacklog sends the backlog to a new client.
func (b *unixSocket) sendBacklog(c *client, backlog []byte) {
	defer b.work.Done()
	defer close(c.ready)
	if n, err := c.write(backlog); err != nil {
		b.drop(c, backlog[n:])
	}
}

// set makes c the client. clientMu is held.
func (b *unixSocket) set(c *client) {
	b.client = c
	close(b.changed)
	b.changed = make(chan struct{})
}

// current returns the client, or nil.
func (b *unixSocket) current() *client {
	b.clientMu.Lock()
	defer b.clientMu.Unlock()
	return b.client
}

// drop ends a connection and keeps the output that the client did not get.
func (b *unixSocket) drop(c *client, unsent []byte) {
	b.clientMu.Lock()
	if b.client == c {
		b.set(nil)
	}
	b.keep(unsent)
	b.clientMu.Unlock()
	_ = c.conn.Close()
}

// keep adds to the backlog. clientMu is held.
func (b *unixSocket) keep(p []byte) {
	b.backlog = append(b.backlog, p...)
	if n := len(b.backlog) - maxBacklog; n > 0 {
		b.backlog = append([]byte(nil), b.backlog[n:]...)
	}
}

// Write writes output to the client, and waits until the client has taken it.
// Without a client the output goes to the backlog.
func (b *unixSocket) Write(p []byte) (int, error) {
	done := 0
	for {
		b.clientMu.Lock()
		c := b.client
		if b.closed {
			b.clientMu.Unlock()
			return done, fmt.Errorf("serial port on %s: %w", b.path, net.ErrClosed)
		}
		if c == nil {
			b.keep(p)
			b.clientMu.Unlock()
			return done + len(p), nil
		}
		b.clientMu.Unlock()
		<-c.ready // sendBacklog ends with the connection at the latest
		if b.current() != c {
			continue
		}
		n, err := c.write(p)
		if err == nil {
			return done + n, nil
		}
		b.drop(c, nil)
		p = p[n:]
		done += n
	}
}

// ReadInput reads from the client. It is called by one goroutine at a time.
func (b *unixSocket) ReadInput(ctx context.Context, p []byte) (int, error) {
	for {
		b.clientMu.Lock()
		c, changed, closed := b.client, b.changed, b.closed
		mute := c != nil && c.mute
		b.clientMu.Unlock()
		if closed {
			return 0, io.EOF
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if c == nil || mute {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		n, err := readContext(ctx, c.conn, p)
		if n > 0 {
			return n, nil
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
		case errors.Is(err, io.EOF) && !hungUp(c.conn):
			// The client sends no more, but still reads.
			b.clientMu.Lock()
			c.mute = true
			b.clientMu.Unlock()
		default:
			b.drop(c, nil)
		}
	}
}

// readContext reads, and returns os.ErrDeadlineExceeded when ctx ends.
func readContext(ctx context.Context, conn net.Conn, p []byte) (int, error) {
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return 0, err
	}
	over := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(over)
		_ = conn.SetReadDeadline(time.Unix(1, 0))
	})
	n, err := conn.Read(p)
	if !stop() {
		<-over // the deadline must not hit the next read
	}
	return n, err
}

// hungUp reports whether the other end has closed its socket in both directions.
func hungUp(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	gone := true
	_ = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		_, err := unix.Poll(fds, 0)
		gone = err == nil && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone
}

// Close closes the connection and the listener, and removes the socket.
func (b *unixSocket) Close() error {
	b.clientMu.Lock()
	if b.closed {
		b.clientMu.Unlock()
		return nil
	}
	b.closed = true
	c := b.client
	b.set(nil)
	b.clientMu.Unlock()
	err := b.ln.Close()
	if c != nil {
		_ = c.conn.Close()
	}
	b.work.Wait()
	return err
}

func newClient(conn *net.UnixConn) *client { return &client{conn: conn, ready: make(chan struct{})} }
