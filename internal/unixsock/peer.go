package unixsock

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// ErrPeer: the process at the other end may not be talked to.
var ErrPeer = errors.New("the process at the other end of the socket is another user's")

// Peer returns what the kernel knows of the process at the other end. For a client that
// is the one that listened first (unix(7), SO_PEERCRED).
func Peer(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, credErr); err != nil {
		return nil, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	return cred, nil
}

// CheckPeer returns an error that matches [ErrPeer] unless the process at the other end
// is of this process's user, or root's.
func CheckPeer(c *net.UnixConn) error {
	cred, err := Peer(c)
	if err != nil {
		return err
	}
	return checkUser(int(cred.Uid), os.Geteuid())
}

func checkUser(peer, own int) error {
	if peer == own || peer == 0 {
		return nil
	}
	return fmt.Errorf("%w: expected user %d, or root, found user %d", ErrPeer, own, peer)
}
