package api

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/unixsock"
	"golang.org/x/sys/unix"
)

// Claim is the right to one name and one socket path. Its holder has locked a
// file beside the socket. The kernel unlocks it when the process ends, however it
// ends; so two claims never share a name, and a socket whose file is not locked is
// stale.
type Claim struct {
	name   string
	socket string
	lock   *os.File

	mu       sync.Mutex // guards all below
	listener net.Listener
	released bool
	foreign  bool // the socket and the lock are another process's, too

	inherited bool // the listener is another process's, and Listen has not been called
}

// maxDefaultNames bounds the search for the next free default name.
const maxDefaultNames = 10000

// ClaimName takes a name in a directory of sockets (see [Directory]), which it
// creates if necessary. An empty name means the first free of vm, vm2, vm3, ...
// If the name is taken the error matches [ErrNameTaken].
func ClaimName(dir, name string) (*Claim, error) {
	if name != "" {
		if err := ValidateName(name); err != nil {
			return nil, err
		}
	}
	if err := makeDir(dir); err != nil {
		return nil, fmt.Errorf("directory for the API socket: %w", err)
	}
	if name != "" {
		return claim(socketIn(dir, name), name)
	}
	for n := 1; n <= maxDefaultNames; n++ {
		name := DefaultName
		if n > 1 {
			name += strconv.Itoa(n)
		}
		c, err := claim(socketIn(dir, name), name)
		if !errors.Is(err, ErrNameTaken) && !errors.Is(err, ErrSocketInUse) {
			return c, err
		}
	}
	return nil, kind.Errorf(ErrNameTaken, "%d default names are taken; give a name", maxDefaultNames)
}

// ClaimSocket takes a socket path of the caller's choice; its directory must
// exist. Such a VM is found by its path only, and [List] does not list it. An
// empty name means [DefaultName]. If the path is in use the error matches
// [ErrSocketInUse].
func ClaimSocket(path, name string) (*Claim, error) {
	if name == "" {
		name = DefaultName
	}
	if err := ValidateName(name); err != nil {
		return nil, err
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	c, err := claim(path, name)
	if errors.Is(err, ErrNameTaken) {
		return nil, kind.Errorf(ErrSocketInUse, "%s belongs to a running VM; choose another path, or stop that VM", path)
	}
	return c, err
}

func claim(socket, name string) (*Claim, error) {
	lock, err := lockFile(lockOf(socket))
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, kind.Errorf(ErrNameTaken, "a VM named %q runs already; choose another name, or stop it with: govmm stop %s", name, name)
	}
	if err != nil {
		return nil, err
	}
	c := &Claim{name: name, socket: socket, lock: lock}
	if err := removeStale(socket); err != nil {
		c.Release()
		return nil, err
	}
	return c, nil
}

// lockFile opens and locks path, which it creates. A holder unlinks the file
// before it unlocks it, so the file that was locked may no longer be the one at
// path: then lockFile tries again. It is not open for writing: what [Claim.Record] has
// written stays as it is.
func lockFile(path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock for the API socket: %w", err)
		}
		if err := flock(f, unix.LOCK_EX|unix.LOCK_NB); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		mine, err1 := f.Stat()
		there, err2 := os.Lstat(path)
		if err1 == nil && err2 == nil && os.SameFile(mine, there) {
			return f, nil
		}
		_ = f.Close()
	}
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// removeStale removes the socket of a VM whose process has died. The caller holds
// the lock.
func removeStale(socket string) error {
	err := unixsock.RemoveStale(socket)
	switch {
	case errors.Is(err, unixsock.ErrNotSocket):
		return kind.Errorf(ErrSocketInUse, "%s exists and is not a socket; remove it, or choose another path", socket)
	case errors.Is(err, unixsock.ErrInUse):
		return kind.Errorf(ErrSocketInUse, "another program answers on %s; choose another path", socket)
	case err != nil:
		return fmt.Errorf("find out whether %s is in use: %w", socket, err)
	}
	return nil
}

// Name returns the VM's name.
func (c *Claim) Name() string { return c.name }

// Socket returns the path that the socket has or will have.
func (c *Claim) Socket() string { return c.socket }

// Listen makes the socket, with mode 0600. It appears at its path only once it
// accepts connections.
func (c *Claim) Listen() (net.Listener, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.inherited && !c.released {
		c.inherited = false
		return c.listener, nil
	}
	if c.released || c.listener != nil {
		return nil, fmt.Errorf("listen on %s: the claim is released, or listens already", c.socket)
	}
	ln, err := unixsock.Listen(c.socket)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", c.socket, err)
	}
	c.listener = unixsock.NewHeld(ln)
	return c.listener, nil
}

// Release closes the listener, removes the socket and unlocks the name. It may be
// called more than once.
func (c *Claim) Release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.released {
		return
	}
	c.released = true
	if ln, ok := c.listener.(*unixsock.Held); ok {
		if c.foreign {
			// A connection that has been taken, and that the server does not know of yet, is
			// answered, too.
			ln.Drain(shutdownTimeout)
			ln.Keep()
		}
		_ = ln.Close()
	}
	if !c.foreign {
		_ = os.Remove(c.lock.Name())
	}
	_ = c.lock.Close()
}
