package net

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	stdnet "net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a link to another process that listens at a unix socket, as passt and gvproxy
// do. It is connected while this process has the right to run the guest, and at no other
// time: such a process takes one guest.
type socket struct {
	*stream
	path string
	mtu  uint16
	held bool // it was connected before
}

var _ link = (*socket)(nil)

// openSocket looks whether there is a socket at the path. It does not connect.
func openSocket(o Options, log *slog.Logger) (*socket, error) {
	s := &socket{stream: newStream("net socket="+o.Socket, o.Queues, log), path: o.Socket, mtu: o.MTU}
	if len(o.Socket) >= len(unix.RawSockaddrUnix{}.Path) {
		return nil, fmt.Errorf("%s: the path has %d characters, expected fewer than %d", s.name, len(o.Socket), len(unix.RawSockaddrUnix{}.Path))
	}
	st, err := os.Stat(o.Socket)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s: there is no such socket (start the other end first, as in: passt --socket %s)", s.name, o.Socket)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", s.name, err)
	case st.Mode()&fs.ModeSocket == 0:
		return nil, fmt.Errorf("%s: expected a socket, found %s", s.name, st.Mode().Type())
	}
	s.dial = func(streamState) (*wire, error) { return dialSocket(s.path) }
	return s, nil
}

// dialSocket connects.
func dialSocket(path string) (*wire, error) {
	d := stdnet.Dialer{Timeout: 2 * time.Second}
	c, err := d.Dial("unix", path)
	if err != nil {
		var call *os.SyscallError
		if errors.As(err, &call) {
			err = call
		}
		return nil, err
	}
	return newWire(c.(*stdnet.UnixConn), false)
}

// Take connects.
func (s *socket) Take() error {
	err := s.connect()
	if err != nil && s.held { // the guest goes on without a link until there is one
		s.lateConnect(err)
		return nil
	}
	s.held = s.held || err == nil
	return err
}

// Yield disconnects, so that the process at the destination can connect.
func (s *socket) Yield() error {
	s.disconnect()
	return nil
}

// MTU is what the guest is told; 0: nothing.
func (s *socket) MTU() uint16 { return s.mtu }
