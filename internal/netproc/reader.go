package netproc

import (
	"encoding/binary"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Reader reads frames from a stream. One goroutine at a time uses it.
type Reader struct {
	raw               syscall.RawConn
	shortest, longest int
	buf               []byte
	from, to          int // what was read and is not taken yet

	// The Fill under way.
	once func(fd uintptr) bool
	idle func()
	n    int
	err  error
}

// NewReader makes a reader of frames of so many bytes. A peer that sends others has broken
// the protocol.
func NewReader(c Conn, shortest, longest int) (*Reader, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	r := &Reader{raw: raw, shortest: shortest, longest: longest}
	r.once = r.read
	return r, nil
}

// Next returns a frame that has been read whole; nil: Fill has to read more. It is valid
// until the next Fill.
func (r *Reader) Next() ([]byte, error) {
	have := r.buf[r.from:r.to]
	if len(have) < lengthBytes {
		return nil, nil
	}
	n := binary.BigEndian.Uint32(have)
	if n < uint32(r.shortest) || n > uint32(r.longest) {
		return nil, fmt.Errorf("a frame of %d bytes, expected %d to %d", n, r.shortest, r.longest)
	}
	if len(have) < lengthBytes+int(n) {
		return nil, nil
	}
	r.from += lengthBytes + int(n)
	return have[lengthBytes : lengthBytes+int(n)], nil
}

// Fill waits for bytes, after it has called idle, which may be nil. At the stream's end it
// returns [ErrEnd].
func (r *Reader) Fill(idle func()) error {
	if r.buf == nil {
		r.buf = make([]byte, 3*(lengthBytes+r.longest))
	}
	if r.from == r.to {
		r.from, r.to = 0, 0
	} else if len(r.buf)-r.to < lengthBytes+r.longest {
		r.from, r.to = 0, copy(r.buf, r.buf[r.from:r.to])
	}
	r.idle, r.n, r.err = idle, 0, nil
	if err := r.raw.Read(r.once); err != nil {
		return err
	}
	switch {
	case r.err != nil:
		return r.err
	case r.n == 0:
		return ErrEnd
	}
	r.to += r.n
	return nil
}

// read returns false if it has to wait.
func (r *Reader) read(fd uintptr) bool {
	for {
		n, err := unix.Read(int(fd), r.buf[r.to:])
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			if r.idle != nil {
				r.idle()
			}
			return false
		}
		r.n, r.err = max(n, 0), err
		return true
	}
}
