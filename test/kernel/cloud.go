package kernel

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// CloudGuest returns Debian's cloud kernel, a bzImage, and what its initial RAM
// disk needs besides /init: drivers for the machine's devices in /modules, and a static
// bin/busybox. They come from Debian and are kept in the user's cache.
func CloudGuest() (bzImage string, files []File, err error) {
	bzImage, files, err = DebianModules(CloudKernel, "virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon",
		"vmw_vsock_virtio_transport", "button", "evdev")
	if err != nil {
		return "", nil, err
	}
	path, err := Busybox()
	if err != nil {
		return "", nil, err
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		return "", nil, err
	}
	return bzImage, append(files, File{Name: "bin", Mode: directory | 0o755}, File{Name: "bin/busybox", Data: busybox}), nil
}

// VsockEcho compiles the program that talks by AF_VSOCK, vsockecho, and returns
// its content.
func VsockEcho() ([]byte, error) {
	dir, err := here()
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp("", "govmm-vsockecho-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	out := filepath.Join(tmp, "vsockecho")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "./vsockecho")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile vsockecho: %w\n%s", err, text)
	}
	return os.ReadFile(out)
}
