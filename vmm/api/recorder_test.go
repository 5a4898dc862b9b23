package api_test

import (
	"net"
	"sync"
)

// recorder is a listener whose connections can be cut, as the kernel does with
// those of a process that dies.
type recorder struct {
	net.Listener
	mu    sync.Mutex // guards conns
	conns []net.Conn
}

func (r *recorder) Accept() (net.Conn, error) {
	c, err := r.Listener.Accept()
	if err == nil {
		r.mu.Lock()
		r.conns = append(r.conns, c)
		r.mu.Unlock()
	}
	return c, err
}

func (r *recorder) kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		_ = c.Close()
	}
}
