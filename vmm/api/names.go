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

// DirectoryVariable is the environment variable that overrides [Directory].
const DirectoryVariable = "GOVMM_RUNTIME_DIR"

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

// Directory returns where sockets are: $GOVMM_RUNTIME_DIR if set, else
// /run/govmm for root, $XDG_RUNTIME_DIR/govmm for others, and where that is
// not set /run/user/UID/govmm or, if there is no such place,
// /tmp/govmm-UID. It creates nothing.
func Directory() string { return directory(os.Geteuid(), os.Getenv, ownedDir) }

func directory(uid int, getenv func(string) string, owned func(string, int) bool) string {
	if dir := getenv(DirectoryVariable); dir != "" {
		return dir
	}
	if uid == 0 {
		return "/run/govmm"
	}
	if dir := getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) { // a relative one is to be ignored, says the XDG specification
		return filepath.Join(dir, "govmm")
	}
	id := strconv.Itoa(uid)
	if dir := filepath.Join("/run/user", id); owned(dir, uid) {
		return filepath.Join(dir, "govmm")
	}
	return "/tmp/govmm-" + id
}

func ownedDir(dir string, uid int) bool {
	st, err := os.Lstat(dir)
	if err != nil || !st.IsDir() {
		return false
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	return ok && int(sys.Uid) == uid
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
	if !ownedDir(dir, os.Geteuid()) {
		return fmt.Errorf("%s (%v) is not a directory of this user; remove it, or set %s", dir, st.Mode(), DirectoryVariable)
	}
	return nil
}

// socketIn returns the path of the VM's socket in a directory of sockets.
func socketIn(dir, name string) string { return filepath.Join(dir, name+socketSuffix) }
