package unixsock

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Adopt returns the listener of a socket at path that another process of this host has made
// by [Listen] and passed. Close removes the path. It takes the file over, also if it fails.
func Adopt(file *os.File, path string) (*Listener, error) {
	n := 0
	raw, err := file.SyscallConn()
	if err == nil {
		_ = raw.Control(func(fd uintptr) { n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN) })
	}
	if err == nil && n == 0 {
		err = errors.New("it does not listen")
	}
	var ln net.Listener
	if err == nil {
		ln, err = net.FileListener(file)
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return nil, fmt.Errorf("take over the socket %s: %w", path, err)
	}
	u, ok := ln.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("take over the socket %s: expected a unix socket, found %v", path, ln.Addr().Network()), ln.Close())
	}
	return &Listener{UnixListener: u, path: path}, nil
}

// Keep makes Close leave the path: the socket is another process's, too.
func (l *Listener) Keep() { l.remove.Do(func() {}) }
