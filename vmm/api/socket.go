package api

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath is the longest path that fits a sockaddr_un with its final
// zero (unix(7)).
const maxSocketPath = 107

// shortPath returns a name for path that fits a socket address. A long one is
// reached through its directory's file descriptor, which stays open until done
// is called.
func shortPath(path string) (short string, done func(), err error) {
	if len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	dir, base := filepath.Split(path)
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, fmt.Errorf("open %s: %w", dir, err)
	}
	short = fmt.Sprintf("/proc/self/fd/%d/%s", fd, base)
	if len(short) > maxSocketPath {
		_ = unix.Close(fd)
		return "", nil, fmt.Errorf("socket name %q is too long", base)
	}
	return short, func() { _ = unix.Close(fd) }, nil
}

// listenUnix makes a socket that only its owner can open. It gets its mode
// before it gets a name, and its path only once it listens: there is no moment
// at which somebody else could connect, or a client be refused.
func listenUnix(path string) (net.Listener, error) {
	temp := path + ".new"
	short, done, err := shortPath(temp)
	if err != nil {
		return nil, err
	}
	defer done()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer func() { _ = f.Close() }() // net.FileListener has a duplicate
	// Linux gives the file that bind makes the mode of the socket itself.
	if err := unix.Fchmod(fd, 0o600); err != nil {
		return nil, fmt.Errorf("fchmod 0600: %w", err)
	}
	_ = os.Remove(temp) // left by a process that died here
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: short}); err != nil {
		return nil, fmt.Errorf("bind: %w", err)
	}
	ln, err := publish(f, temp, path)
	if err != nil {
		_ = os.Remove(temp)
		return nil, err
	}
	return ln, nil
}

// publish starts to listen on the socket bound to temp and moves it to path,
// where nothing may be.
func publish(f *os.File, temp, path string) (net.Listener, error) {
	st, err := os.Lstat(temp)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm() != 0o600 {
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
	if err := unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("rename %s: %w", temp, err)
	}
	return ln, nil
}

// connectTimeout bounds one connect: a process that is stopped (SIGSTOP) and
// has a full backlog would hold its clients for ever.
const connectTimeout = 2 * time.Second

func dialUnix(path string) (net.Conn, error) { return dialUnixContext(context.Background(), path) }

func dialUnixContext(ctx context.Context, path string) (net.Conn, error) {
	short, done, err := shortPath(path)
	if err != nil {
		return nil, err
	}
	defer done()
	d := net.Dialer{Timeout: connectTimeout}
	return d.DialContext(ctx, "unix", short)
}
