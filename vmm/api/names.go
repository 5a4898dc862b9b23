package api

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/govmm/govmm/internal/kind"
)

// DefaultName is the name of a VM that is given none; if it is taken, the VM gets
// the next free of vm2, vm3, ...
const DefaultName = "vm"

const socketSuffix = ".sock"

// UnitDirectory is the directory of the sockets of VMs that the units of the package run, as
// a user of their own who owns it. The package makes it (packaging/tmpfiles.conf).
const UnitDirectory = "/run/govmm-units"

// ValidateName reports why a VM cannot have the name; the error matches
// [vmm.ErrInvalid].
func ValidateName(name string) error {
	valid := len(name) >= 1 && len(name) <= 64
	for i, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case i > 0 && (c == '_' || c == '.' || c == '-'):
		default:
			valid = false
		}
	}
	if valid {
		return nil
	}
	return kind.Invalid("name %.80q: must be 1 to 64 of a-z A-Z 0-9 _ . - that start with a letter or digit", name)
}

// Directory returns the directory of the sockets: $XDG_RUNTIME_DIR/govmm. For
// root it is /run/govmm if that variable is not set or is /run/user/0, as a login
// sets it: root finds its VMs in whatever way it became root. For other users
// without the variable it is [UnitDirectory], for its owner, or /run/user/UID/govmm or,
// if there is no /run/user/UID, /tmp/govmm-UID. Directory creates nothing.
func Directory() string {
	return directory(os.Geteuid(), os.Getenv("XDG_RUNTIME_DIR"), ownerOf)
}

const rootDirectory = "/run/govmm"

// seenFrom lists the directories in which who uses dir finds VMs: root finds those of units, too.
func seenFrom(dir string) []string {
	if dir == rootDirectory && os.Geteuid() == 0 && ownerOf(UnitDirectory) >= 0 {
		return []string{dir, UnitDirectory}
	}
	return []string{dir}
}

// directory is Directory; owner returns the owner of a directory, -1 if there is
// no such directory.
func directory(uid int, xdg string, owner func(string) int) string {
	login := filepath.Join("/run/user", strconv.Itoa(uid))
	if uid == 0 && xdg == login {
		xdg = ""
	}
	// The XDG base directory specification: a relative path is to be ignored,
	// and the directory must be the user's (after sudo -E it is not).
	if o := owner(xdg); filepath.IsAbs(xdg) && (o == uid || o == -1) {
		return filepath.Join(xdg, "govmm")
	}
	switch {
	case uid == 0:
		return rootDirectory
	case owner(UnitDirectory) == uid:
		return UnitDirectory
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

// makeDir creates dir with mode 0700, or gives it that mode.
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

// checkOwner refuses a directory of another user: in /tmp anybody can make one,
// with a socket in it that only looks like a VM's.
func checkOwner(dir string) error {
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if dir == UnitDirectory && os.Geteuid() == 0 && st.IsDir() { // only root makes anything in /run
		return nil
	}
	if ownerOf(dir) != os.Geteuid() {
		return fmt.Errorf("%s: expected a directory of this user, found %v of user %d; remove it, or set XDG_RUNTIME_DIR", dir, st.Mode(), ownerOf(dir))
	}
	return nil
}

// socketIn returns the path of the VM's socket in a directory of sockets.
func socketIn(dir, name string) string { return filepath.Join(dir, name+socketSuffix) }

// lockOf returns the path of the file that the holder of a socket has locked.
func lockOf(socket string) string { return socket + ".lock" }
