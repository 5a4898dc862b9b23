package api

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/govmm/govmm/internal/unixsock"
	"golang.org/x/sys/unix"
)

// maxRecord bounds what a claim's file has, in bytes.
const maxRecord = 1 << 20

// Record writes what the VM was started with into the claim's file, for a process that takes
// the guest over later ([ReadRecord]). It is called before anything of the guest runs, by
// the user whose claim it is: what is in the file then is not the guest's word.
func (c *Claim) Record(text []byte) error {
	if len(text) > maxRecord {
		return fmt.Errorf("record of %d bytes: must be at most %d", len(text), maxRecord)
	}
	f, err := os.OpenFile(c.lock.Name(), os.O_WRONLY|os.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("record how the VM was started: %w", err)
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("record how the VM was started: %w", err)
	}
	return nil
}

// OpenRecord opens the file of the claim on a socket, which must be of this user.
func OpenRecord(socket string, uid int) (*os.File, error) {
	f, err := os.OpenFile(lockOf(socket), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != uid || st.Mode&0o022 != 0 || st.Nlink != 1) {
		err = fmt.Errorf("%s: expected a file that only user %d can write, found mode %#o of user %d", f.Name(), uid, st.Mode, st.Uid)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// ReadRecord reads what Record has written.
func ReadRecord(f *os.File) ([]byte, error) {
	text, err := io.ReadAll(io.NewSectionReader(f, 0, maxRecord+1))
	if err == nil && len(text) > maxRecord {
		err = fmt.Errorf("record of more than %d bytes", maxRecord)
	}
	return text, err
}

// Files duplicates what another process needs to go on with the claim: its lock and its
// listener.
func (c *Claim) Files() (files []*os.File, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.released || c.listener == nil {
		return nil, fmt.Errorf("pass on the claim on %s: it is released, or does not listen yet", c.socket)
	}
	// Not by Fd, which would make the listener block.
	fd, err := unix.FcntlInt(c.lock.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	lock := os.NewFile(uintptr(fd), c.lock.Name())
	ln, err := c.listener.(*unixsock.Held).UnixListener.File()
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return []*os.File{lock, ln}, nil
}

// Inherit returns the claim that another process of this host has, with what Files has
// returned there. record is the file that OpenRecord has opened: the lock must be on that.
// Until Own it is the other one's: Release leaves the socket and the lock. It takes the
// files over, also if it fails.
func Inherit(socket, name string, record *os.File, files []*os.File) (c *Claim, err error) {
	taken := 0
	defer func() {
		if err != nil {
			for _, f := range files[taken:] {
				_ = f.Close()
			}
			err = fmt.Errorf("take over the claim on %s: %w", socket, err)
		}
	}()
	if len(files) != 2 {
		return nil, fmt.Errorf("expected two descriptors, found %d", len(files))
	}
	if err := ValidateName(name); err != nil {
		return nil, err
	}
	a, err := record.Stat()
	if err != nil {
		return nil, err
	}
	b, err := files[0].Stat()
	if err != nil {
		return nil, err
	}
	if !os.SameFile(a, b) {
		return nil, errors.New("the lock is on another file")
	}
	taken = 2
	ln, err := unixsock.Adopt(files[1], socket)
	if err != nil {
		return nil, errors.Join(err, files[0].Close())
	}
	fd, err := unix.FcntlInt(files[0].Fd(), unix.F_DUPFD_CLOEXEC, 0)
	_ = files[0].Close()
	if err != nil {
		return nil, errors.Join(err, ln.UnixListener.Close())
	}
	return &Claim{name: name, socket: socket, lock: os.NewFile(uintptr(fd), lockOf(socket)), listener: unixsock.NewHeld(ln), foreign: true, inherited: true}, nil
}

// Own makes an inherited claim this process's: Release then removes the socket.
func (c *Claim) Own() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.foreign = false
}

// Leave makes the claim another process's, which has inherited it: Release then leaves the
// socket and the lock.
func (c *Claim) Leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.foreign = true
	if ln, ok := c.listener.(*unixsock.Held); ok {
		ln.Keep()
	}
}

// Hold makes the listener take no connection, and returns when none is being taken: those
// that come wait. Continue undoes it.
func (c *Claim) Hold() { c.listener.(*unixsock.Held).Hold() }

// Continue undoes Hold.
func (c *Claim) Continue() { c.listener.(*unixsock.Held).Continue() }
