package vsock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrInUse: another process listens on the device's socket.
var ErrInUse = errors.New("another process listens there")

// Listen makes the device's socket, for its owner only. A socket that nobody
// listens on is left over and replaced; one that is in use is [ErrInUse], and
// what is no socket stays as it is. A device that listens already does nothing.
func (d *Device) Listen() error {
	d.listenMu.Lock()
	defer d.listenMu.Unlock()
	if d.listener != nil {
		return nil
	}
	ln, err := listenUnix(d.config.Path)
	if err != nil {
		return fmt.Errorf("vsock %s: listen: %w", d.config.Path, err)
	}
	d.listener = ln
	d.accepting.Go(func() { d.accept(ln) })
	return nil
}

// Unlisten removes the socket, so that another device may have it. Connections
// stay.
func (d *Device) Unlisten() error {
	d.listenMu.Lock()
	defer d.listenMu.Unlock()
	if d.listener == nil {
		return nil
	}
	err := d.listener.Close()
	d.accepting.Wait()
	d.listener = nil
	if err != nil {
		return fmt.Errorf("vsock %s: stop listening: %w", d.config.Path, err)
	}
	return nil
}

// accept takes connections until the listener is closed.
func (d *Device) accept(ln *net.UnixListener) {
	for {
		host, err := ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			d.logf("vsock %s: accept: %v", d.config.Path, err)
			time.Sleep(100 * time.Millisecond) // out of descriptors, most likely
			continue
		}
		d.serving.Lock()
		if d.closed || d.full() {
			_ = host.Close() // that is the answer
		} else {
			d.clients[host] = true
			d.tasks.Go(func() { d.client(host) })
		}
		d.serving.Unlock()
	}
}

// listenUnix listens on a socket that only its owner may connect to.
func listenUnix(path string) (ln *net.UnixListener, err error) {
	unlock, err := lockDirectory(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// The mode of a socket before bind is that of the file bind makes, so
		// there is no moment at which others could connect.
		var chmod error
		if err := c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmod
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, ErrInUse // made between two moments by a stranger
	}
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// removeStale removes a socket that nobody listens on. The directory is locked,
// or the one that is removed might be another device's that has just been made.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode()&fs.ModeSocket == 0:
		return errors.New("the file exists and is not a socket")
	}
	// A datagram socket cannot connect to one of streams, and is told so: who
	// listens sees nothing of it.
	conn, err := net.Dial("unixgram", path)
	if err == nil {
		_ = conn.Close() // it was only a question
	}
	if err == nil || errors.Is(err, unix.EPROTOTYPE) {
		return ErrInUse
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}

// lockDirectory keeps other devices from making sockets in a directory, by a
// lock that the kernel drops with this process (flock(2)).
func lockDirectory(dir string) (unlock func() error, err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil, errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOLCK):
			// Where a file system has no locks, this is as good as it gets.
			return f.Close, nil
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end):
			return nil, errors.Join(fmt.Errorf("lock the directory %s: %w", dir, err), f.Close())
		}
	}
}
