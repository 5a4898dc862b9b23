package image

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// target is a file that has no name, or a temporary one, until it is complete.
type target struct {
	*os.File
	path  string // where it will be
	temp  string // its name by now; "": none
	force bool
	// direct writes past the page cache, whole blocks from aligned memory; nil: the file
	// system cannot.
	direct *os.File
}

// unnamed counts temporary names of this process.
var unnamed atomic.Uint32

// create makes the file that will be at path. If force is not set there must be none.
func create(path string, force bool) (*target, error) {
	st, err := os.Stat(path)
	switch {
	case err == nil && !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s: expected the name of a new file, found what is no file", path)
	case err == nil && !force:
		return nil, fmt.Errorf("%s: it is there already, and is not overwritten without --force", path)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return nil, err
	case err != nil:
		if _, err := os.Lstat(path); err == nil {
			return nil, fmt.Errorf("%s: it is a symbolic link to nothing", path)
		}
	}
	if err == nil { // what the name leads to is replaced, not the link
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return nil, err
		}
	}
	t := &target{path: path, force: force}
	fd, err := unix.Open(filepath.Dir(path), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		t.File = os.NewFile(uintptr(fd), path)
		t.openDirect()
		return t, nil
	}
	// The file system has no files without a name, or there is an error that this one finds as well.
	temp := t.tempName()
	if t.File, err = os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		var path *os.PathError
		if errors.As(err, &path) {
			err = path.Err
		}
		return nil, fmt.Errorf("make a file in %s: %w", filepath.Dir(t.path), err)
	}
	t.temp = temp
	t.openDirect()
	return t, nil
}

// directBlock is what writes past the page cache are aligned to: at least a block of every
// device.
const directBlock = 4096

// openDirect opens the file once more.
func (t *target) openDirect() {
	if fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", t.Fd()), unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0); err == nil {
		t.direct = os.NewFile(uintptr(fd), t.path)
	}
}

func (t *target) tempName() string {
	return filepath.Join(filepath.Dir(t.path), fmt.Sprintf(".%.200s.%d-%d.importing", filepath.Base(t.path), os.Getpid(), unnamed.Add(1)))
}

// commit makes the content durable, gives the file its name, and makes that durable.
func (t *target) commit() error {
	if err := t.Sync(); err != nil {
		return err
	}
	if t.temp == "" {
		temp := t.tempName()
		if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", t.Fd()), unix.AT_FDCWD, temp, unix.AT_SYMLINK_FOLLOW); err != nil {
			return fmt.Errorf("name %s: %w", temp, err)
		}
		t.temp = temp
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if t.force {
		flags = 0
	}
	err := unix.Renameat2(unix.AT_FDCWD, t.temp, unix.AT_FDCWD, t.path, flags)
	if errors.Is(err, unix.EINVAL) { // a file system without this flag
		if _, statErr := os.Lstat(t.path); !errors.Is(statErr, os.ErrNotExist) {
			err = unix.EEXIST
		} else {
			err = unix.Rename(t.temp, t.path)
		}
	}
	if err != nil {
		return fmt.Errorf("rename %s to %s: %w", t.temp, t.path, err)
	}
	t.temp = ""
	dir, err := os.Open(filepath.Dir(t.path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// abandon removes what is not complete. It does nothing after commit.
func (t *target) abandon() {
	if t.temp != "" {
		_ = os.Remove(t.temp)
	}
	_ = t.direct.Close() // a nil one is an error
	_ = t.Close()
}
