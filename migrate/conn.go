package migrate

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/govmm/govmm/internal/strictcbor"
	"golang.org/x/sys/unix"
)

// conn is one connection of a migration: frames over a stream. One goroutine reads
// and one writes. Nothing is allocated for a page or a span.
//
// A time-out is for progress, not for a whole frame: while bytes move, a link is
// slow and not dead.
type conn struct {
	net.Conn
	raw syscall.RawConn // nil if there is no descriptor, or other bytes than its own

	readTimeout  time.Duration // 0: for ever
	writeTimeout time.Duration
	life         *liveness // nil: this connection's own silence counts
	broken       atomic.Pointer[error]

	sent, received atomic.Uint64 // bytes
	midFrame       bool          // a write failed inside a frame: no other may follow

	out  [headerSize]byte
	in   [headerSize]byte
	bufs net.Buffers
	iov  []unix.Iovec
}

func newConn(c net.Conn, readTimeout, writeTimeout time.Duration) *conn {
	nc := &conn{Conn: c, readTimeout: readTimeout, writeTimeout: writeTimeout}
	// Only of these two types it is known that the bytes of the stream are those
	// of the descriptor: a type that embeds one of them may change them.
	switch s := c.(type) {
	case *net.TCPConn:
		// Frames are written whole, so waiting for more only adds latency.
		// A kernel that refuses either option still moves the bytes.
		_ = s.SetNoDelay(true)
		_ = s.SetKeepAlive(true)
		nc.raw, _ = s.SyscallConn()
	case *net.UnixConn:
		nc.raw, _ = s.SyscallConn()
	}
	return nc
}

// liveness is when bytes last arrived on any of a session's connections. A single
// one may be silent for long, such as control while pages arrive. The peer is dead
// when all are silent.
type liveness struct {
	since time.Time
	last  atomic.Int64 // nanoseconds after since
}

func newLiveness() *liveness { return &liveness{since: time.Now()} }

func (l *liveness) touch() { l.last.Store(int64(time.Since(l.since))) }

// idle is how long nothing has arrived.
func (l *liveness) idle() time.Duration { return time.Since(l.since) - time.Duration(l.last.Load()) }

// interrupt makes the read that waits, and all later ones, return err. Writes are
// not affected.
func (c *conn) interrupt(err error) {
	c.broken.CompareAndSwap(nil, &err)
	_ = c.SetReadDeadline(time.Unix(1, 0)) // after an error it is closed, and reads return anyway
}

// beforeRead sets the deadline of a read, and then checks for an interrupt. That one
// sets broken before its own deadline, so one of the two is seen.
func (c *conn) beforeRead() error {
	if err := c.SetReadDeadline(deadline(c.readTimeout)); err != nil {
		return err
	}
	if err := c.broken.Load(); err != nil {
		return *err
	}
	return nil
}

// mayWait reports whether a read that timed out is to be tried again.
func (c *conn) mayWait() bool {
	return c.broken.Load() != nil || c.life != nil && c.life.idle() < c.readTimeout
}

// took counts bytes that arrived.
func (c *conn) took(n int) {
	c.received.Add(uint64(n))
	if c.life != nil && n > 0 {
		c.life.touch()
	}
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// deadline is when a peer that makes no progress counts as dead.
func deadline(timeout time.Duration) time.Time {
	if timeout == 0 {
		return time.Time{}
	}
	return time.Now().Add(timeout)
}

// silent gives a time-out a text that says what happened.
func silent(err error, timeout time.Duration) error {
	if isTimeout(err) {
		return fmt.Errorf("the peer has been silent for %v: %w", timeout, err)
	}
	return err
}

// writev writes all of bufs. It consumes the slice.
func (c *conn) writev(bufs net.Buffers) error {
	c.bufs = bufs
	for {
		if err := c.SetWriteDeadline(deadline(c.writeTimeout)); err != nil {
			return err
		}
		n, err := c.bufs.WriteTo(c.Conn)
		c.sent.Add(uint64(n))
		if err == nil {
			return nil
		}
		if n > 0 {
			c.midFrame = true
			if isTimeout(err) && len(c.bufs) > 0 {
				continue // slow, but it moves
			}
		}
		return silent(err, c.writeTimeout)
	}
}

// writeFrame writes a header and its payload in one vectored write.
func (c *conn) writeFrame(h header, payload ...[]byte) error {
	n := 0
	for _, p := range payload {
		n += len(p)
	}
	h.length = uint32(n)
	h.encode(c.out[:])
	bufs := append(net.Buffers{c.out[:]}, payload...)
	if err := c.writev(bufs); err != nil {
		return fmt.Errorf("send %v: %w", h.typ, err)
	}
	c.midFrame = false
	return nil
}

// writeSpan writes a PAGES or PACKED frame. The first two of bufs are free for the
// header and the meta, so that nothing is allocated.
func (c *conn) writeSpan(h header, meta []byte, bufs net.Buffers) error {
	h.encode(c.out[:])
	bufs[0], bufs[1] = c.out[:], meta
	if err := c.writev(bufs); err != nil {
		return fmt.Errorf("send %v: %w", h.typ, err)
	}
	c.midFrame = false
	return nil
}

// writeControl writes a CBOR message.
func (c *conn) writeControl(t frameType, v any) error {
	b, err := strictcbor.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %v: %w", t, err)
	}
	return c.writeFrame(header{typ: t}, b)
}

// readFull fills p.
func (c *conn) readFull(p []byte) error {
	for len(p) > 0 {
		if err := c.beforeRead(); err != nil {
			return err
		}
		n, err := c.Read(p)
		c.took(n)
		p = p[n:]
		if err != nil && len(p) > 0 {
			if isTimeout(err) && c.mayWait() {
				continue
			}
			if err == io.EOF {
				return io.ErrUnexpectedEOF
			}
			return silent(err, c.readTimeout)
		}
	}
	return nil
}

// readHeader reads the next frame's header.
func (c *conn) readHeader() (header, error) {
	if err := c.readFull(c.in[:]); err != nil {
		return header{}, err
	}
	return decodeHeader(c.in[:]), nil
}

// readPayload reads a payload of at most limit bytes. Memory is allocated as bytes
// arrive, not as the header announces.
func (c *conn) readPayload(h header, limit int) ([]byte, error) {
	if int64(h.length) > int64(limit) {
		return nil, fmt.Errorf("%w: %v of %d bytes: must be at most %d", ErrProtocol, h.typ, h.length, limit)
	}
	const step = 1 << 20
	left := int(h.length)
	buf := make([]byte, 0, min(left, step))
	for left > 0 {
		n := min(left, max(step, len(buf))) // at most doubles what has arrived
		at := len(buf)
		buf = append(buf, make([]byte, n)...)
		if err := c.readFull(buf[at:]); err != nil {
			return nil, fmt.Errorf("read %v: %w", h.typ, err)
		}
		left -= n
	}
	return buf, nil
}

// readControl reads the payload of a CBOR message.
func (c *conn) readControl(h header, v any) error {
	b, err := c.readPayload(h, maxControl)
	if err != nil {
		return err
	}
	return decodeControl(h.typ, b, v)
}

// readv fills the buffers, one after another, by vectored reads. It consumes the
// slice.
func (c *conn) readv(bufs [][]byte) error {
	if c.raw == nil {
		for _, b := range bufs {
			if err := c.readFull(b); err != nil {
				return err
			}
		}
		return nil
	}
	const maxIovec = 1024 // UIO_MAXIOV
	for len(bufs) > 0 {
		c.iov = c.iov[:0]
		for _, b := range bufs[:min(len(bufs), maxIovec)] {
			v := unix.Iovec{Base: unsafe.SliceData(b)}
			v.SetLen(len(b))
			c.iov = append(c.iov, v)
		}
		n, err := c.readvOnce()
		if err != nil {
			if isTimeout(err) && c.mayWait() {
				continue
			}
			return err
		}
		for n > 0 {
			if n < len(bufs[0]) {
				bufs[0] = bufs[0][n:]
				break
			}
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
	}
	return nil
}

// readvOnce reads at least one byte into c.iov.
func (c *conn) readvOnce() (int, error) {
	if err := c.beforeRead(); err != nil {
		return 0, err
	}
	var n uintptr
	var errno syscall.Errno
	err := c.raw.Read(func(fd uintptr) bool {
		for {
			n, _, errno = syscall.Syscall(syscall.SYS_READV, fd,
				uintptr(unsafe.Pointer(unsafe.SliceData(c.iov))), uintptr(len(c.iov)))
			if errno != syscall.EINTR {
				return errno != syscall.EAGAIN
			}
		}
	})
	switch {
	case err != nil:
		return 0, silent(err, c.readTimeout)
	case errno != 0:
		return 0, os.NewSyscallError("readv", errno)
	case n == 0:
		return 0, io.ErrUnexpectedEOF
	}
	c.took(int(n))
	return int(n), nil
}

// queued returns how many bytes the peer's kernel has not acknowledged yet
// (SIOCOUTQ, tcp(7)). ok is false where that is not available.
func (c *conn) queued() (n int, ok bool) {
	if c.raw == nil {
		return 0, false
	}
	var ioctlErr error
	err := c.raw.Control(func(fd uintptr) { n, ioctlErr = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return n, err == nil && ioctlErr == nil
}
