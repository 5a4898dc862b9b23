package kernel

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// CloudKernel is Debian's package with the kernel of its cloud images, which is made
// for guests. Its drivers are modules.
const CloudKernel = "linux-image-cloud-amd64"

// DebianKernel returns the path of the kernel of Debian's cloud images, a
// bzImage, from the package linux-image-cloud-amd64. apt fetches it into the
// user's cache once; it need not be installed.
func DebianKernel() (string, error) {
	return fromDebian("vmlinuz-cloud-amd64", behind(CloudKernel), "boot/vmlinuz-*")
}

// Busybox returns the path of a static busybox with all its applets, from the
// package busybox-static.
func Busybox() (string, error) {
	return fromDebian("busybox", "busybox-static", "*bin/busybox")
}

// behind is a shell expression for the package that a metapackage depends on:
// linux-image-amd64 depends on the newest linux-image-VERSION-amd64.
func behind(pkg string) string {
	return `$(apt-cache depends ` + pkg + ` | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p' | head -1)`
}

// fromDebian returns the path of name in the cache. If it is not there, it is taken
// from a package. Package and file are shell expressions.
func fromDebian(name, pkg, file string) (string, error) {
	return inCache(name, func(tmp string) (string, error) {
		if err := unpackDebian(tmp, pkg); err != nil {
			return "", err
		}
		found, err := filesBelow(filepath.Join(tmp, "x"), file)
		if err == nil && len(found) != 1 {
			err = fmt.Errorf("%s has %d files %s, not one", pkg, len(found), file)
		}
		if err != nil {
			return "", err
		}
		return found[0], nil
	})
}

// inCache returns the path of name in the user's cache. If it is not there, fetch makes
// it, a file or a directory, in a temporary directory.
func inCache(name string, fetch func(tmp string) (path string, err error)) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = "/var/cache"
	}
	dir := filepath.Join(cache, "govmm", "debian")
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		return path, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(dir, "tmp-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	made, err := fetch(tmp)
	if err != nil {
		return "", fmt.Errorf("fetch %s from Debian (run apt-get update?): %w", name, err)
	}
	// Two tests may fetch at once: the rename leaves one complete result. A directory
	// is the first one's.
	if err := os.Rename(made, path); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return path, nil
}

// unpackDebian fetches a package, a shell expression, and unpacks it into dir/x.
func unpackDebian(dir, pkg string) error {
	cmd := exec.Command("sh", "-ec", "apt-get download "+pkg+"; dpkg-deb -x *.deb x; rm *.deb")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download %s: %w: %s", pkg, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// filesBelow are the files below dir whose path relative to it matches the pattern. A
// * at its beginning also matches a /.
func filesBelow(dir, pattern string) (found []string, err error) {
	end, anywhere := strings.CutPrefix(pattern, "*")
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		matches := anywhere && strings.HasSuffix(rel, end)
		if !anywhere {
			if matches, err = filepath.Match(pattern, rel); err != nil {
				return err
			}
		}
		if matches {
			found = append(found, path)
		}
		return nil
	})
	return found, err
}
