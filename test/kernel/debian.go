package kernel

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// DebianKernel returns the path of the kernel of Debian's cloud images, a
// bzImage, from the package linux-image-cloud-amd64. apt fetches it into the
// user's cache once; it need not be installed.
func DebianKernel() (string, error) {
	return fromDebian("vmlinuz-cloud-amd64",
		`$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p' | head -1)`, "boot/vmlinuz-*")
}

// fromDebian returns the path of name in the cache. If it is not there, it is
// the one file of a package, both given as the shell takes them.
func fromDebian(name, pkg, file string) (string, error) {
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
	// The rename makes a file of two tests at once whole in both.
	cmd := exec.Command("sh", "-ec", "apt-get download "+pkg+"; dpkg-deb -x *.deb x; mv x/"+file+" ../"+name)
	cmd.Dir = tmp
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("fetch %s from Debian (run apt-get update?): %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return path, nil
}
