package migrate

import (
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// flow is a connection below the framing, and below TLS where there is TLS. It counts
// what moves. No operation on it times out by itself: one that takes long may be one
// over a slow link. Whether the peer is dead is for the session's [pulse].
type flow struct {
	net.Conn
	raw syscall.RawConn // nil: there is no descriptor, or the stream is not what is written to it
	tcp bool

	sent, received    atomic.Uint64 // bytes
	aliveOut, aliveIn atomic.Uint64 // of those, in ALIVE frames, which are no progress
	reads, writes     waits
	in, out           vector
	left              uint64 // for moved: the most that was seen to leave
}

// waits counts the waits of one kind of operation, twice: it is odd while one waits.
type waits struct{ n atomic.Uint64 }

func (w *waits) toggle()     { w.n.Add(1) }
func (w *waits) under() bool { return w.n.Load()%2 == 1 }

func newFlow(c net.Conn) *flow {
	f := &flow{Conn: c}
	// Only of these two types it is known that the bytes of the stream are those
	// of the descriptor: a type that embeds one of them may change them.
	switch s := c.(type) {
	case *net.TCPConn:
		// Frames are written whole, so waiting for more only adds latency.
		// A kernel that refuses either option still moves the bytes.
		_ = s.SetNoDelay(true)
		_ = s.SetKeepAlive(true)
		f.raw, _ = s.SyscallConn()
		f.tcp = true
	case *net.UnixConn:
		f.raw, _ = s.SyscallConn()
	}
	f.in.init("readv", unix.SYS_READV, &f.reads)
	f.out.init("writev", unix.SYS_WRITEV, &f.writes)
	return f
}

// RemoteAddr implements [net.Conn].
func (f *flow) RemoteAddr() net.Addr { return peerOf(f.Conn) }

// Read implements [net.Conn].
func (f *flow) Read(p []byte) (int, error) {
	f.reads.toggle()
	defer f.reads.toggle()
	n, err := f.Conn.Read(p)
	f.received.Add(uint64(n))
	return n, err
}

// Write implements [net.Conn].
func (f *flow) Write(p []byte) (int, error) {
	f.writes.toggle()
	defer f.writes.toggle()
	n, err := f.Conn.Write(p)
	f.sent.Add(uint64(n))
	return n, err
}

// readv fills the buffers, one after another. It consumes the slice.
func (f *flow) readv(bufs [][]byte) error {
	for len(bufs) > 0 {
		n, err := f.in.do(f.raw.Read, bufs)
		f.received.Add(uint64(n))
		if err != nil {
			return err
		}
		bufs = consume(bufs, n)
	}
	return nil
}

// writev writes the buffers, one after another, and returns how many bytes of them. It
// consumes the slice.
func (f *flow) writev(bufs [][]byte) (done int, err error) {
	for len(bufs) > 0 {
		n, err := f.out.do(f.raw.Write, bufs)
		f.sent.Add(uint64(n))
		done += n
		if err != nil {
			return done, err
		}
		bufs = consume(bufs, n)
	}
	return done, nil
}

// consume drops the first n bytes of bufs.
func consume(bufs [][]byte, n int) [][]byte {
	for len(bufs) > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs[0] = nil
		bufs = bufs[1:]
	}
	if n > 0 {
		bufs[0] = bufs[0][n:]
	}
	return bufs
}

// vector makes the vectored system calls of one direction. A call that has something to
// copy does not wait for the peer, however long guest memory takes to be there.
type vector struct {
	name  string
	iov   []unix.Iovec
	waits *waits
	call  func(fd uintptr) bool // made once, so that nothing is allocated for a call
	n     uintptr
	errno syscall.Errno
	wait  bool
}

func (v *vector) init(name string, trap uintptr, w *waits) {
	v.name, v.waits = name, w
	v.call = func(fd uintptr) bool {
		for {
			v.n, _, v.errno = syscall.Syscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(v.iov))), uintptr(len(v.iov)))
			if v.errno != syscall.EINTR {
				break
			}
		}
		if wait := v.errno == syscall.EAGAIN; wait != v.wait {
			v.wait = wait
			v.waits.toggle()
		}
		return !v.wait
	}
}

// do moves at least one byte from or to the first of bufs that are not empty.
func (v *vector) do(with func(func(fd uintptr) bool) error, bufs [][]byte) (int, error) {
	const maxIovec = 1024 // UIO_MAXIOV
	v.iov = v.iov[:0]
	for _, b := range bufs[:min(len(bufs), maxIovec)] {
		i := unix.Iovec{Base: unsafe.SliceData(b)}
		i.SetLen(len(b))
		v.iov = append(v.iov, i)
	}
	v.n, v.errno = 0, 0
	err := with(v.call)
	clear(v.iov) // the connection may be kept longer than the buffers
	if v.wait {  // it has not ended by itself
		v.wait = false
		v.waits.toggle()
	}
	switch {
	case err != nil:
		return 0, err
	case v.errno != 0:
		return 0, os.NewSyscallError(v.name, v.errno)
	case v.n == 0:
		return 0, io.ErrUnexpectedEOF
	}
	return int(v.n), nil
}

// moved changes whenever something moves, in either direction, that is no ALIVE: what
// was read here, and what has left for the peer. Of TCP it includes what the two kernels
// have exchanged while an operation waits: segments with data that came, and bytes that
// the peer has acknowledged. Bytes that only went into a buffer here have not moved.
func (f *flow) moved() uint64 {
	in := f.received.Load() - f.aliveIn.Load()
	alive := f.aliveOut.Load()
	out := f.sent.Load()
	if queued, ok := f.queued(); ok {
		out -= min(out, uint64(queued))
	}
	if f.tcp && f.raw != nil {
		_ = f.raw.Control(func(fd uintptr) { // after an error it is closed, and nothing moves
			if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
				out = info.Bytes_acked
				if alive+f.aliveIn.Load() == 0 { // otherwise a segment may be an ALIVE
					in += uint64(info.Data_segs_in)
				}
			}
		})
	}
	f.left = max(f.left, out-min(out, alive))
	return in + f.left
}

// queued returns how many bytes the peer's kernel has not acknowledged yet
// (SIOCOUTQ, tcp(7)). ok is false where that is not available.
func (f *flow) queued() (n int, ok bool) {
	if f.raw == nil {
		return 0, false
	}
	var ioctlErr error
	err := f.raw.Control(func(fd uintptr) { n, ioctlErr = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) })
	return n, err == nil && ioctlErr == nil
}
