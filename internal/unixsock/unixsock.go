// Package unixsock makes stream sockets in the file system that only their
// owner can connect to, and connects to such sockets.
package unixsock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"golang.org/x/sys/unix"
)

var (
	// ErrInUse: another process listens on the socket.
	ErrInUse = errors.New("another process listens there")
	// ErrNotSocket: the file at the path is not a socket.
	ErrNotSocket = errors.New("the file exists and is not a socket")
)

const (
	// maxPath is the longest path that fits a sockaddr_un with its final zero
	// (unix(7)).
	maxPath = 107
	// connectTimeout bounds one connect: a process that is stopped (SIGSTOP)
	// and has a full backlog would hold its clients for ever.
	connectTimeout = 2 * time.Second
	// lockTimeout bounds the wait for another process that makes a socket in
	// the same directory.
	lockTimeout = time.Second
)

// Listener is a socket with a path. Close removes the path.
type Listener struct {
	*net.UnixListener
	path   string
	remove sync.Once
}

// Listen makes a socket of mode 0600. The path appears when the socket already
// listens: no other user can ever connect, and no client is refused. A socket
// that nobody listens on is replaced; the errors for other files are [ErrInUse]
// and [ErrNotSocket].
func Listen(path string) (*Listener, error) {
	unlock, err := lockDirectory(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := RemoveStale(path); err != nil {
		return nil, err
	}
	temp := path + ".new"
	_ = os.Remove(temp) // left by a process that died here
	f, err := bind(temp)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // net.FileListener duplicates it
	ln, err := publish(f, temp, path)
	if err != nil {
		_ = os.Remove(temp)
		return nil, err
	}
	return &Listener{UnixListener: ln, path: path}, nil
}

// Addr is the path.
func (l *Listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close stops listening and removes the path.
func (l *Listener) Close() error {
	// Before the socket closes: afterwards the path may be another process's.
	l.remove.Do(func() { _ = os.Remove(l.path) })
	return l.UnixListener.Close()
}

// bind makes a socket that is bound to path.
func bind(path string) (*os.File, error) {
	short, done, err := shorten(path)
	if err != nil {
		return nil, err
	}
	defer done()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), path)
	// Linux gives the file that bind makes the mode of the socket itself.
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("fchmod 0600: %w", err), f.Close())
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: short}); err != nil {
		return nil, errors.Join(fmt.Errorf("bind: %w", err), f.Close())
	}
	return f, nil
}

// publish starts to listen on the socket bound to temp and moves it to path,
// where no file may be.
func publish(f *os.File, temp, path string) (*net.UnixListener, error) {
	st, err := os.Lstat(temp)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm() != 0o600 { // a file system with its own idea of modes
		if err := os.Chmod(temp, 0o600); err != nil { // nobody can connect yet
			return nil, err
		}
	}
	if err := unix.Listen(int(f.Fd()), unix.SOMAXCONN); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		err = ErrInUse // made meanwhile, by a process that takes no lock
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("rename %s: %w", temp, err), ln.Close())
	}
	return ln.(*net.UnixListener), nil
}

// RemoveStale removes a socket that nobody listens on. A file that does not
// exist is no error.
func RemoveStale(path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return ErrNotSocket
	}
	short, done, err := shorten(path)
	if err != nil {
		return err
	}
	defer done()
	// A datagram socket cannot connect to a stream socket, and the error says
	// whether somebody listens, who notices nothing.
	conn, err := net.Dial("unixgram", short)
	if err == nil {
		_ = conn.Close()
	}
	switch {
	case err == nil, errors.Is(err, unix.EPROTOTYPE):
		return ErrInUse
	case !errors.Is(err, unix.ECONNREFUSED):
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Dial connects to the socket at path, which may be longer than a socket
// address.
func Dial(ctx context.Context, path string) (net.Conn, error) {
	short, done, err := shorten(path)
	if err != nil {
		return nil, err
	}
	defer done()
	d := net.Dialer{Timeout: connectTimeout}
	return d.DialContext(ctx, "unix", short)
}

// shorten returns a name for path that fits a socket address. A long path is
// reached through its directory's file descriptor, which stays open until done
// is called.
func shorten(path string) (short string, done func(), err error) {
	if len(path) <= maxPath {
		return path, func() {}, nil
	}
	dir, base := filepath.Split(path)
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, fmt.Errorf("open %s: %w", dir, err)
	}
	short = fmt.Sprintf("/proc/self/fd/%d/%s", fd, base)
	if len(short) > maxPath {
		_ = unix.Close(fd)
		return "", nil, fmt.Errorf("socket name %q is too long", base)
	}
	return short, func() { _ = unix.Close(fd) }, nil
}

// lockDirectory keeps other processes from making sockets in a directory with
// this package: one that removes a stale socket might otherwise remove the new
// one of another. The kernel drops the lock with the process (flock(2)).
func lockDirectory(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrPermission) {
		return func() {}, nil // no lock in a directory that cannot be read
	}
	if err != nil {
		return nil, err
	}
	for end := time.Now().Add(lockTimeout); ; time.Sleep(5 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil, errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOLCK):
			return func() { _ = f.Close() }, nil
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end):
			return nil, errors.Join(fmt.Errorf("lock the directory %s: %w", dir, err), f.Close())
		}
	}
}
