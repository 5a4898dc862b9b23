package migrate

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/internal/strictcbor"
)

// conn is one connection of a migration: frames over a stream. One goroutine reads.
// Nothing is allocated for a page or a span.
type conn struct {
	*flow                // whose deadlines and Close are the connection's, below TLS too
	stream io.ReadWriter // what frames go over: the flow, or TLS over it

	// Of a connection over TLS, set before its first frame.
	lower *lower        // nil: it is plain
	plain *bufio.Writer // puts the small parts of a frame into one record
	from  identity      // of the peer
	peer  string        // what it is called in an error

	renewed atomic.Bool // another connection has taken its place, at the source

	// writing is held while a frame is written: an ALIVE may be due at any time. It
	// guards last and out.
	writing chan struct{}
	last    bool // no frame may follow: one said so, or a write failed inside a frame
	out     [headerSize]byte

	in [headerSize]byte
}

func newConn(c net.Conn) *conn {
	f := newFlow(c)
	return &conn{flow: f, stream: f, writing: make(chan struct{}, 1)}
}

// vectored reports whether guest memory can be read from, and written to, the stream
// without a copy.
func (c *conn) vectored() bool { return c.flow.raw != nil && c.stream == io.ReadWriter(c.flow) }

// Read and Write are those of the stream.
func (c *conn) Read(p []byte) (int, error) { return c.stream.Read(p) }

func (c *conn) Write(p []byte) (int, error) { return c.stream.Write(p) }

// errLast is what follows after the last frame.
var errLast = errors.New("this connection takes no more frames")

// write writes a frame. It consumes bufs, whose first one is free for the header.
func (c *conn) write(h header, bufs net.Buffers) error {
	c.writing <- struct{}{}
	defer func() { <-c.writing }()
	return c.writeLocked(h, bufs)
}

// writeLocked is write for one who holds writing.
func (c *conn) writeLocked(h header, bufs net.Buffers) (err error) {
	if c.last {
		return fmt.Errorf("send %v: %w", h.typ, errLast)
	}
	c.last = true // until the frame is whole
	h.encode(c.out[:])
	bufs[0] = c.out[:]
	var n int
	switch {
	case c.vectored():
		n, err = c.flow.writev(bufs)
	case c.lower != nil:
		n, err = 1, c.seal(bufs) // after an error TLS is broken
	default:
		n, err = writeAll(c.stream, bufs)
	}
	if err == nil || n == 0 {
		c.last = h.typ.last()
	}
	if err != nil {
		return fmt.Errorf("send %v: %w", h.typ, err)
	}
	return nil
}

// seal writes a frame over TLS: in full records, and with few system calls. crypto/tls
// copies what it encrypts, so guest memory may change meanwhile.
func (c *conn) seal(bufs [][]byte) error {
	if c.plain == nil {
		c.plain = bufio.NewWriterSize(c.stream, maxRecord)
	}
	c.lower.begin()
	_, err := writeAll(c.plain, bufs)
	return cmp.Or(err, c.plain.Flush(), c.lower.end())
}

// maxRecord is the most that a TLS record carries (RFC 8446, section 5.1).
const maxRecord = 16 << 10

// writeAll writes the buffers, one after another.
func writeAll(w io.Writer, bufs [][]byte) (n int, err error) {
	for _, b := range bufs {
		some, err := w.Write(b)
		if n += some; err != nil {
			return n, err
		}
	}
	return n, nil
}

// writeFrame writes a header and its payload in one vectored write.
func (c *conn) writeFrame(h header, payload ...[]byte) error {
	n := 0
	for _, p := range payload {
		n += len(p)
	}
	h.length = uint32(n)
	return c.write(h, append(net.Buffers{nil}, payload...))
}

// writeSpan writes a PAGES or PACKED frame. The first two of bufs are free for the
// header and the meta, so that nothing is allocated.
func (c *conn) writeSpan(h header, meta []byte, bufs net.Buffers) error {
	bufs[1] = meta
	return c.write(h, bufs)
}

// writeControl writes a CBOR message.
func (c *conn) writeControl(t frameType, v any) error {
	b, err := strictcbor.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %v: %w", t, err)
	}
	return c.writeFrame(header{typ: t}, b)
}

// writeLast writes a message that ends the exchange, if that is possible within grace.
func (c *conn) writeLast(t frameType, v any, grace time.Duration) {
	_ = c.SetWriteDeadline(time.Now().Add(grace)) // also of a write that hangs
	_ = c.writeControl(t, v)                      // the peer may be gone
}

// writeAlive says that this side lives, unless a frame is under way, which says it too.
func (c *conn) writeAlive(idle bool) {
	select {
	case c.writing <- struct{}{}:
	default:
		return
	}
	defer func() { <-c.writing }()
	if c.last {
		return
	}
	h := header{typ: frameAlive}
	if idle {
		h.flags = flagIdle
	}
	before := c.flow.sent.Load()
	_ = c.writeLocked(h, net.Buffers{nil}) // whoever waits for something is told
	c.flow.aliveOut.Add(c.flow.sent.Load() - before)
}

// aliveSize is what an ALIVE takes on the wire.
func (c *conn) aliveSize() uint64 {
	if c.lower != nil {
		return headerSize + recordOverhead
	}
	return headerSize
}

// recordOverhead is what a TLS record adds: its header, the inner type and the tag
// (RFC 8446, section 5.2), which has 16 bytes in each cipher suite of crypto/tls.
const recordOverhead = 5 + 1 + 16

// interrupt makes the read that waits, and all later ones, fail. Writes are not affected,
// and over TLS nothing is lost: only a write that times out ends that.
func (c *conn) interrupt() { _ = c.SetReadDeadline(time.Unix(1, 0)) }

// readFull fills p.
func (c *conn) readFull(p []byte) error {
	_, err := io.ReadFull(c.stream, p)
	switch {
	case err == io.EOF:
		return io.ErrUnexpectedEOF
	case err != nil && c.lower != nil:
		return explainAlert(err, c.peer)
	}
	return err
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
		buf = slices.Grow(buf, n)[:at+n]
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

// readv fills the buffers, one after another. It consumes the slice.
func (c *conn) readv(bufs [][]byte) error {
	if c.vectored() {
		return c.flow.readv(bufs)
	}
	for _, b := range bufs {
		if err := c.readFull(b); err != nil {
			return err
		}
	}
	return nil
}
