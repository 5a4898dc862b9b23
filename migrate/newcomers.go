package migrate

import (
	"net"
	"slices"
	"sync"
)

// newcomers are the connections of which a receiver does not know yet what they are for,
// or which it has refused. There is always a place for one more, since the oldest leaves
// for it: whoever says hello at once has long been served by then. A query, a session
// and a probe take no place here.
type newcomers struct {
	mu    sync.Mutex // guards the fields
	conns []net.Conn // oldest first
}

// maxNewcomers bounds the newcomers.
const maxNewcomers = 128

// enter adds a connection. It returns the one that has to be closed for it, or nil.
func (n *newcomers) enter(c net.Conn) (oldest net.Conn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.conns) == maxNewcomers {
		oldest = n.conns[0]
		n.conns = slices.Delete(n.conns, 0, 1)
	}
	n.conns = append(n.conns, c)
	return oldest
}

// leave removes a connection. It returns false if that was closed for another one.
func (n *newcomers) leave(c net.Conn) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := slices.Index(n.conns, c)
	if i < 0 {
		return false
	}
	n.conns = slices.Delete(n.conns, i, i+1)
	return true
}
