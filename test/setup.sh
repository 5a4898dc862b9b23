#!/bin/bash
# Installs what the tests need and a fresh Debian machine with Go lacks.
set -euo pipefail

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need git git
need make make
need gcc gcc        # the race detector, and the demo guest
need ld binutils
need qemu-system-x86_64 qemu-system-x86 # boots the demo guest too
need qemu-img qemu-utils  # makes images that are refused, and holds locks on others
need losetup mount        # block devices
need iasl acpica-tools  # the DSDT
need mke2fs e2fsprogs   # root disks
need spin spin          # checks the models of test/model
need cpio cpio          # checks initial RAM disks
need ip iproute2        # network namespaces
need ping iputils-ping  # guests that answer
for tool in bzip2 lz4 xz zstd; do # what kernels are packed with
	need $tool "${tool/#xz/xz-utils}"
done
# The Linux test kernel's build (test/kernel/build.sh).
need flex flex
need bison bison
need bc bc
[ -e /usr/include/libelf.h ] || missing+=(libelf-dev)
[ -e /usr/include/linux/kvm.h ] || missing+=(linux-libc-dev) # layouts are checked against it
[ -e /usr/include/stdio.h ] || missing+=(libc6-dev)

# A test takes Debian's kernel apart, which apt fetches: it needs its lists.
lists=yes
apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || lists=

if [ ${#missing[@]} -gt 0 ] || [ -z "$lists" ]; then
	run=()
	if [ "$(id -u)" != 0 ]; then
		if ! sudo -n true 2>/dev/null; then
			echo "setup: missing: ${missing[*]:-the lists of apt}; install them, or run as root" >&2
			exit 1
		fi
		run=(sudo -n)
	fi
	"${run[@]}" apt-get update -q
	if [ ${#missing[@]} -gt 0 ]; then
		"${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
	fi
fi
go mod download
