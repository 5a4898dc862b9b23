package migrate

import (
	"fmt"
	"net"
	"sync"
)

// lower is the connection below TLS. It collects the records of a frame, which crypto/tls
// writes one by one, and bounds what one key encrypts.
type lower struct {
	*flow
	first []byte // was read before TLS began
	limit uint64 // bytes in either direction

	outMu   sync.Mutex // guards the fields below, and orders writes
	out     []byte     // records that have not been written
	collect bool       // records of a frame are coming
	err     error      // of a write: nothing may follow
}

// lowerBuffer is how many bytes of records are written at once.
const lowerBuffer = 256 << 10

// keyLimit bounds the bytes of one direction of a TLS connection. crypto/tls never changes
// the key by itself, and AES-GCM keeps its promise for some 2^24.5 full records (RFC 8446,
// section 5.5): about 380 GiB. Where it is kept it is a field, which tests set.
const keyLimit = 64 << 30

var _ net.Conn = (*lower)(nil)

// Read implements [net.Conn].
func (l *lower) Read(p []byte) (int, error) {
	if len(l.first) > 0 {
		n := copy(p, l.first)
		l.first = l.first[n:]
		return n, nil
	}
	if l.received.Load() > l.limit {
		return 0, fmt.Errorf("%w: the peer sent more than %d bytes under one key", ErrProtocol, l.limit)
	}
	return l.flow.Read(p)
}

// Write implements [net.Conn]. crypto/tls reuses p afterwards.
func (l *lower) Write(p []byte) (int, error) {
	l.outMu.Lock()
	defer l.outMu.Unlock()
	if len(l.out)+len(p) > lowerBuffer || !l.collect {
		l.flush()
	}
	if l.err == nil && l.sent.Load()+uint64(len(l.out)+len(p)) > l.limit {
		l.err = fmt.Errorf("more than %d bytes would be sent under one key", l.limit)
	}
	if l.err != nil {
		return 0, l.err
	}
	if l.collect {
		l.out = append(l.out, p...)
		return len(p), nil
	}
	n, err := l.flow.Write(p)
	l.err = err
	return n, err
}

// begin collects what follows.
func (l *lower) begin() {
	l.outMu.Lock()
	defer l.outMu.Unlock()
	l.collect = true
}

// end writes what has been collected.
func (l *lower) end() error {
	l.outMu.Lock()
	defer l.outMu.Unlock()
	l.collect = false
	l.flush()
	return l.err
}

// flush writes what has been collected, for one who holds outMu.
func (l *lower) flush() {
	if len(l.out) > 0 && l.err == nil {
		_, l.err = l.flow.Write(l.out)
	}
	l.out = l.out[:0]
}
