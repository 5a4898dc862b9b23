package kernel

import "os"

// CloudGuest returns Debian's cloud kernel, a bzImage, and what its initial RAM
// disk needs beside /init: the drivers of the machine's devices in /modules, and
// a static busybox, bin/busybox. All comes from Debian and is kept in the
// user's cache.
func CloudGuest() (bzImage string, files []File, err error) {
	bzImage, files, err = DebianModules(CloudKernel, "virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon", "button", "evdev")
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
