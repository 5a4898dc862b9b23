package api

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
)

// DefaultName is what a VM is called if nobody says otherwise; when it is
// taken, the next free of vm2, vm3, ...
const DefaultName = "vm"

const socketSuffix = ".sock"

var validName = regexp.MustCompile(`\A[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}\z`)

// ValidateName reports whether a VM may be called name; the error matches
// [ErrInvalid].
func ValidateName(name string) error {
	if validName.MatchString(name) {
		return nil
	}
	return &kindError{ErrInvalid, fmt.Sprintf("%.80q is not a name: 1 to 64 of a-z A-Z 0-9 _ . - that start with a letter or digit are", name)}
}

// Directory returns where sockets are: $XDG_RUNTIME_DIR/govmm, for root
// /run/govmm if that variable is not set or says what a login sets it to
// (/run/user/0): root finds its VMs by whatever way it became root. For others
// without the variable it is /run/user/UID/govmm or, if there is no such place,
// /tmp/govmm-UID. Directory creates nothing.
func Directory() string {
	return directory(os.Geteuid(), os.Getenv("XDG_RUNTIME_DIR"), ownerOf)
}

// directory asks owner for the owner of a directory, -1 if there is none.
func directory(uid int, xdg string, owner func(string) int) string {
	login := filepath.Join("/run/user", strconv.Itoa(uid))
	if uid == 0 && xdg == login {
		xdg = ""
	}
	// The XDG specification: a relative path is to be ignored, and the
	// directory must be the user's (it is not, after sudo -E).
	if o := owner(xdg); filepath.IsAbs(xdg) && (o == uid || o == -1) {
		return filepath.Join(xdg, "govmm")
	}
	switch {
	case uid == 0:
		return "/run/govmm"
	case owner(login) == uid:
		return filepath.Join(login, "govmm")
	}
	return "/tmp/govmm-" + strconv.Itoa(uid)
}

func ownerOf(dir string) int {
	st, err := os.Lstat(dir)
	if err != nil || !st.IsDir() {
		return -1
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return int(sys.Uid)
	}
	return -1
}

// makeDir creates dir with mode 0700 and, if it was there already, takes the
// others' rights to it away.
func makeDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := checkOwner(dir); err != nil {
		return err
	}
	if st, err := os.Lstat(dir); err != nil {
		return err
	} else if st.Mode().Perm() != 0o700 {
		return os.Chmod(dir, 0o700)
	}
	return nil
}

// checkOwner refuses a directory that somebody else made: in /tmp anybody can
// prepare one, with a socket in it that only looks like a VM's.
func checkOwner(dir string) error {
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if ownerOf(dir) != os.Geteuid() {
		return fmt.Errorf("%s (%v) is not a directory of this user; remove it, or set XDG_RUNTIME_DIR", dir, st.Mode())
	}
	return nil
}

// socketIn returns the path of the VM's socket in a directory of sockets.
func socketIn(dir, name string) string { return filepath.Join(dir, name+socketSuffix) }

// lockOf returns the file that the holder of a socket has locked.
func lockOf(socket string) string { return socket + ".lock" }
