package kernel

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// SystemRoot is the UUID of the file system for which [DebianSystem]'s boot loader is
// configured, on the first partition.
const SystemRoot = "0a1b2c3d-1111-4222-8333-444455556666"

// DebianSystem returns a directory with Debian 12 as debootstrap installs it, with the
// kernel of its cloud images, cloud-init, an SSH server, and the grub.cfg of grub-mkconfig.
// It is made once, by root, in some minutes, and kept in the user's cache.
func DebianSystem() (string, error) {
	return inCache("bookworm-system", func(tmp string) (string, error) {
		root := filepath.Join(tmp, "root")
		err := runAll("", [][]string{
			{"debootstrap", "--variant=minbase", "--include=" + CloudKernel + ",systemd-sysv,udev,cloud-init,openssh-server,python3-cffi-backend,netplan.io,grub-common,grub2-common", "bookworm", root},
			{"sh", "-ec", systemScript, "sh", root, SystemRoot},
			{"rm", "-rf", filepath.Join(root, "var/cache/apt")},
		})
		return root, err
	})
}

// runAll runs commands in a directory.
func runAll(dir string, commands [][]string) error {
	for _, c := range commands {
		cmd := exec.Command(c[0], c[1:]...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			lines := strings.Split(strings.TrimSpace(string(out)), "\n")
			return fmt.Errorf("%s: %w: %s", c[0], err, strings.Join(lines[max(0, len(lines)-4):], "; "))
		}
	}
	return nil
}

// DebianImage returns the path of [DebianSystem] as a [CloudImage], kept in the user's cache.
func DebianImage() (string, error) {
	return inCache("bookworm-system.qcow2", func(tmp string) (string, error) {
		dir, err := DebianSystem()
		if err != nil {
			return "", err
		}
		path := filepath.Join(tmp, "debian.qcow2")
		return path, CloudImage(dir, 2048, path)
	})
}

// CloudImage makes a disk of a directory's files, as Debian's cloud images are: GPT, the root,
// so many MiB of ext4, as partition 1, an ESP before it as partition 15; compressed qcow2.
// Both paths are absolute.
func CloudImage(dir string, mib int, path string) error {
	tmp, err := os.MkdirTemp(filepath.Dir(path), "image-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	return runAll(tmp, [][]string{
		{"mke2fs", "-q", "-F", "-t", "ext4", "-U", SystemRoot, "-d", dir, "root", fmt.Sprintf("%dM", mib)},
		{"truncate", "-s", "32M", "esp"},
		{"mkfs.vfat", "-F", "16", "esp"},
		{"truncate", "-s", fmt.Sprintf("%dM", mib+64), "disk"},
		{"sh", "-ec", fmt.Sprintf(`printf '1: start=34MiB, size=%dMiB, type=linux\n15: start=1MiB, size=32MiB, type=uefi\n' | sfdisk -q -X gpt disk`, mib)},
		{"dd", "if=esp", "of=disk", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none"},
		{"dd", "if=root", "of=disk", "bs=1M", "seek=34", "conv=notrunc,sparse", "status=none"},
		{"qemu-img", "convert", "-c", "-O", "qcow2", "disk", path},
	})
}

// systemScript configures the system in $1, whose root will be the file system $2. A
// grub-probe that tells of the disk that will be takes the place of Debian's meanwhile,
// which would look for a disk here. Root needs no password on the console. systemd has the
// patience that an emulated processor takes.
const systemScript = `
cd "$1"
mv usr/sbin/grub-probe usr/sbin/grub-probe.real
cat >usr/sbin/grub-probe <<'EOF'
#!/bin/sh
for a; do case $a in
--target=device) echo /dev/vda1;; --target=fs_uuid) echo FSUUID;; --target=fs) echo ext2;; --target=partmap) echo gpt;;
--target=drive) echo '(hd0,gpt1)';; --target=compatibility_hint) echo hd0,gpt1;; --target=fs_label) exit 1;;
--target=hints_string) echo "--hint-bios=hd0,gpt1 --hint-efi=hd0,gpt1 --hint-baremetal=ahci0,gpt1";;
esac; done
EOF
sed -i "s/FSUUID/$2/" usr/sbin/grub-probe
chmod 755 usr/sbin/grub-probe
mkdir -p boot/grub etc/default
cat >etc/default/grub <<'EOF'
GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200 earlyprintk=ttyS0,115200 consoleblank=0"
EOF
echo "UUID=$2 / ext4 rw 0 1" >etc/fstab
echo debian >etc/hostname
mkdir -p etc/systemd/system.conf.d
cat >etc/systemd/system.conf.d/slow.conf <<'EOF'
[Manager]
DefaultTimeoutStartSec=1h
DefaultDeviceTimeoutSec=1h
EOF
chroot . grub-mkconfig -o /boot/grub/grub.cfg
chroot . passwd -d root
mv usr/sbin/grub-probe.real usr/sbin/grub-probe
`
