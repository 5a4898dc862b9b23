package main

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/vsock"
	"github.com/govmm/govmm/vmm/sandbox"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// identity is the user that a VM's process becomes when everything is open. nil: it stays
// what it is.
type identity struct{ uid, gid int }

// parseUser reads the value of --user.
func parseUser(s string) (*identity, error) {
	if s == "" {
		return nil, nil
	}
	name, group, grouped := strings.Cut(s, ":")
	u, err := user.Lookup(name)
	if _, numeric := strconv.Atoi(name); numeric == nil {
		u, err = user.LookupId(name)
		if err != nil { // a number that has no name
			u, err = &user.User{Uid: name, Gid: name}, nil
		}
	}
	if err != nil {
		return nil, err
	}
	if grouped {
		u.Gid = group
		if _, numeric := strconv.Atoi(group); numeric != nil {
			g, err := user.LookupGroup(group)
			if err != nil {
				return nil, err
			}
			u.Gid = g.Gid
		}
	}
	id := &identity{}
	for _, n := range []struct {
		to   *int
		text string
	}{{&id.uid, u.Uid}, {&id.gid, u.Gid}} {
		v, err := strconv.ParseUint(n.text, 10, 32)
		if err != nil || v == 1<<32-1 { // which means no change, setresuid(2)
			return nil, fmt.Errorf("%.80q: expected a number below %d, or a name", n.text, uint32(1<<32-1))
		}
		*n.to = int(v)
	}
	if id.uid == 0 {
		return nil, errors.New("expected a user that is not root")
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("only root can become another user")
	}
	return id, nil
}

// do calls f as this user, on a thread of its own kind: what f makes is the user's, and what
// the process could not make, or remove, when it has become the user, fails now.
func (id *identity) do(f func() error) (err error) {
	if id == nil {
		return f()
	}
	runtime.LockOSThread() // Go starts no thread from a locked one, so no other gets these
	if err := effective(id.uid, id.gid); err != nil {
		return err
	}
	err = f()
	if back := effective(0, 0); back != nil {
		return errors.Join(err, back) // the thread stays locked, and ends with the goroutine
	}
	runtime.UnlockOSThread()
	return err
}

// effective sets the effective user and group of this thread; the saved ones stay root's.
func effective(uid, gid int) error {
	const keep = ^uintptr(0)
	if uid == 0 { // root first: it may change the group
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, 0, keep); errno != 0 {
			return fmt.Errorf("become root again: %w", errno)
		}
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, keep, uintptr(gid), keep); errno != 0 {
		return fmt.Errorf("become group %d: %w", gid, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
		return fmt.Errorf("become user %d: %w", uid, errno)
	}
	return nil
}

// become makes the whole process the user's, for good: all threads, without supplementary
// groups, and with no capability but those that policy keeps. Everything is open; what
// devices open or make again later must be the user's too.
func (id *identity) become(devices []virtio.Spec, arrives bool, policy sandbox.Policy) error {
	if id == nil {
		return nil
	}
	if err := id.give(devices); err != nil {
		return err
	}
	if len(policy.Keep) > 0 { // or they would go with the user
		if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0, 0, 0, 0); errno != 0 {
			return fmt.Errorf("become user %d: PR_SET_KEEPCAPS: %w", id.uid, errno)
		}
	}
	for _, step := range []struct {
		call string
		err  func() error
	}{
		{"setgroups", func() error { return syscall.Setgroups([]int{}) }},
		{"setresgid", func() error { return syscall.Setresgid(id.gid, id.gid, id.gid) }},
		{"setresuid", func() error { return syscall.Setresuid(id.uid, id.uid, id.uid) }},
		{"capset", policy.DropCapabilities},
	} {
		if err := step.err(); err != nil {
			return fmt.Errorf("become user %d: %s: %w", id.uid, step.call, err)
		}
	}
	return id.reaches(devices, arrives)
}

// give gives the user the sockets that devices have made.
func (id *identity) give(devices []virtio.Spec) error {
	for _, d := range devices {
		v, ok := d.(*vsock.Spec)
		if !ok {
			continue
		}
		fd, err := unix.Open(v.Path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			continue // a receiver makes it later
		}
		if err != nil {
			return &os.PathError{Op: "open", Path: v.Path, Err: err}
		}
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		// A link to another socket is none of ours.
		if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFSOCK || st.Nlink != 1) {
			err = errors.New("expected a socket with one name")
		}
		if err == nil {
			err = unix.Fchownat(fd, "", id.uid, id.gid, unix.AT_EMPTY_PATH)
		}
		_ = unix.Close(fd)
		if err != nil {
			return fmt.Errorf("give %s to user %d: %w", v.Path, id.uid, err)
		}
	}
	return nil
}

// reaches checks whether the user can do what devices need later: open a disk at a receiver,
// claim a block device again when the guest comes back, make and remove a socket.
func (id *identity) reaches(devices []virtio.Spec, arrives bool) error {
	can := func(path string, how uint32) error {
		if err := unix.Access(path, how); err != nil {
			return fmt.Errorf("%s: user %d, group %d: %w", path, id.uid, id.gid, err)
		}
		return nil
	}
	var errs []error
	for _, d := range devices {
		switch d := d.(type) {
		case *blk.Spec:
			if d.Ephemeral { // it stays open
				continue
			}
			var st unix.Stat_t
			if err := unix.Stat(d.Path, &st); err == nil && !arrives && st.Mode&unix.S_IFMT != unix.S_IFBLK {
				continue // a file stays open
			}
			how := uint32(unix.R_OK | unix.W_OK)
			if d.ReadOnly {
				how = unix.R_OK
			}
			errs = append(errs, can(d.Path, how))
		case *vsock.Spec:
			errs = append(errs, can(filepath.Dir(d.Path), unix.W_OK|unix.X_OK))
		}
	}
	return errors.Join(errs...)
}
