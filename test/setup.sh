#!/bin/bash
# Installs what the tests need and a fresh Debian 12 with Go does not have.
set -euo pipefail

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need git git
need make make
need gcc gcc        # the race detector, the demo guest
need ld binutils
need qemu-system-x86_64 qemu-system-x86 # boots the demo guest as well
need qemu-img qemu-utils  # makes images that must be refused, and locks images
need cloud-init cloud-init # reads seeds
need isoinfo genisoimage   # lists their files
need ssh-keygen openssh-client
need curl curl          # asks the API, as the documentation does
need losetup mount        # block devices
need iasl acpica-tools  # the DSDT
need mke2fs e2fsprogs   # root disks
need mkfs.btrfs btrfs-progs # clones of disks
need mkfs.vfat dosfstools # and what else a guest may boot from
need mcopy mtools
need mksquashfs squashfs-tools
need genisoimage genisoimage
need sfdisk fdisk
need spin spin          # checks the models of test/model
need cpio cpio          # checks initial RAM disks
need ip iproute2        # network namespaces
need ping iputils-ping  # guests answer it
need pgrep procps       # finds the processes of a VM
need passt passt        # a network at a socket
need nc netcat-openbsd  # the console, as the documentation has it
need chromium chromium  # looks at reports
need lintian lintian    # checks the package
need systemd-sysusers systemd # reads its files
if [ -n "${GOVMM_ACCEPT:-}" ]; then # make accept installs it, and starts its units
	need debootstrap debootstrap
	need systemd-nspawn systemd-container
fi
need tmux tmux          # a terminal that tests look at
for tool in bzip2 lz4 xz zstd; do # compressors of kernels
	need $tool "${tool/#xz/xz-utils}"
done
# The Linux test kernel's build (test/kernel/build.sh).
need flex flex
need bison bison
need bc bc
[ -e /usr/include/libelf.h ] || missing+=(libelf-dev)
[ -e /usr/include/linux/kvm.h ] || missing+=(linux-libc-dev) # layouts are checked against it
[ -e /usr/include/stdio.h ] || missing+=(libc6-dev)

# The tests fetch two of Debian's packages with apt-get, which needs its lists: the
# source of the test kernel, and the kernel of Debian's cloud images.
lists=yes
if [ "$(. /etc/os-release && echo $ID$VERSION_ID)" = debian12 ]; then
	apt-cache show linux-source-6.1 linux-image-cloud-amd64 >/dev/null 2>&1 || lists=
else
	echo "setup: this is not Debian 12: tests that boot Linux fail unless the caches have its kernels." >&2
	echo "setup: CONTRIBUTING.md has a container for all tests." >&2
fi

run=()
if [ ${#missing[@]} -gt 0 ] || [ -z "$lists" ]; then
	if [ "$(id -u)" != 0 ]; then
		if ! sudo -n true 2>/dev/null; then
			echo "setup: missing: ${missing[*]:-the lists of apt-get}: install them, or run as root" >&2
			exit 1
		fi
		run=(sudo -n)
	fi
	"${run[@]}" apt-get update -q
	if [ ${#missing[@]} -gt 0 ]; then
		"${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
	fi
fi
if ! command -v prometheus >/dev/null || ! command -v promtool >/dev/null; then
	# Without the package's service, and what its pages need.
	[ "$(id -u)" = 0 ] || run=(sudo -n)
	work=$(mktemp -d)
	(cd "$work" && apt-get download -q prometheus && dpkg-deb -x prometheus_*.deb x)
	"${run[@]}" install -m 755 "$work"/x/usr/bin/prometheus "$work"/x/usr/bin/promtool /usr/local/bin
	rm -r "$work"
fi
go mod download
go -C test/client mod download
