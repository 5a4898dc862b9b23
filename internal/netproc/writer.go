package netproc

import (
	"encoding/binary"
	"errors"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Conn is one end of a stream: a *net.UnixConn, or an *os.File of a socket that does not
// block.
type Conn interface {
	SyscallConn() (syscall.RawConn, error)
	Close() error
}

const (
	// lengthBytes is the length of a frame's length.
	lengthBytes = 4
	// atOnce is how many bytes are collected before they are written.
	atOnce = 64 << 10
	// keep is how much of a buffer is kept when it is empty.
	keep = 256 << 10
)

// ErrFull: the other end does not take frames as fast as they come.
var ErrFull = errors.New("the other end does not take its frames")

// Writer writes frames to a stream and never waits: what the other end does not take is
// kept, up to a limit, and written when it can be. Its methods may be called by any
// goroutine.
type Writer struct {
	raw   syscall.RawConn
	limit int

	buffer   sync.Mutex // guards all below
	buf      []byte
	done     int   // bytes of buf that are written
	draining bool  // a goroutine writes
	err      error // the stream's end
}

// NewWriter makes a writer that keeps at most limit bytes.
func NewWriter(c Conn, limit int) (*Writer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	return &Writer{raw: raw, limit: limit}, nil
}

// Write adds a frame, which is what the parts are together. It may stay in the buffer until
// Flush. It fails with [ErrFull] if the frame is dropped; any other error is the stream's end.
func (w *Writer) Write(parts ...[]byte) error {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	w.buffer.Lock()
	defer w.buffer.Unlock()
	if w.err == nil && len(w.buf)-w.done+lengthBytes+n > w.limit && !w.draining {
		w.flush()
	}
	switch {
	case w.err != nil:
		return w.err
	case len(w.buf)-w.done+lengthBytes+n > w.limit:
		return ErrFull
	}
	if w.done > 0 && len(w.buf)+lengthBytes+n > cap(w.buf) {
		w.buf, w.done = append(w.buf[:0], w.buf[w.done:]...), 0
	}
	w.buf = binary.BigEndian.AppendUint32(w.buf, uint32(n))
	for _, p := range parts {
		w.buf = append(w.buf, p...)
	}
	if len(w.buf)-w.done >= atOnce && !w.draining {
		w.flush()
	}
	return w.err
}

// Flush writes what has been collected, as far as the other end takes it now.
func (w *Writer) Flush() error {
	w.buffer.Lock()
	defer w.buffer.Unlock()
	if len(w.buf) > w.done && !w.draining && w.err == nil {
		w.flush()
	}
	return w.err
}

// flush writes once, and leaves the rest to a goroutine. buffer is held.
func (w *Writer) flush() {
	if err := w.raw.Write(func(fd uintptr) bool { w.write(fd); return true }); err != nil && w.err == nil {
		w.err = err
	}
	if w.err == nil && len(w.buf) > w.done {
		w.draining = true
		go w.drain()
	}
}

// drain writes until nothing is left.
func (w *Writer) drain() {
	err := w.raw.Write(func(fd uintptr) bool {
		w.buffer.Lock()
		defer w.buffer.Unlock()
		for w.err == nil && len(w.buf) > w.done {
			if !w.write(fd) {
				return false
			}
		}
		w.draining = false
		return true
	})
	w.buffer.Lock()
	defer w.buffer.Unlock()
	if err != nil {
		w.draining = false
		if w.err == nil {
			w.err = err
		}
	}
}

// write writes once and reports whether anything went. buffer is held.
func (w *Writer) write(fd uintptr) bool {
	for {
		n, err := unix.SendmsgN(int(fd), w.buf[w.done:], nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		switch err {
		case nil:
			if w.done += n; w.done == len(w.buf) {
				w.buf, w.done = w.buf[:0], 0
				if cap(w.buf) > keep {
					w.buf = nil
				}
			}
			return n > 0
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		}
		w.err = err
		return false
	}
}
