#!/bin/sh
# Builds the Linux test kernel, or finds it built, and prints the path of its
# vmlinux. The bzImage of the same kernel lies beside it.
#
#	test/kernel/build.sh [acpi|noacpi|poison|disk]		(default: noacpi)
#
# What it builds is kept in a cache, $GOVMM_KERNEL_CACHE or govmm/kernel in
# $XDG_CACHE_HOME, keyed by a hash of configuration and script. Only one build
# runs at a time; others wait for it. Its words go to standard error, and the
# compiler's to build.log in the cache.
set -eu

variant=${1:-noacpi}
here=$(cd "$(dirname "$0")" && pwd)
cache=${GOVMM_KERNEL_CACHE:-${XDG_CACHE_HOME:-${HOME:-/var/cache}/.cache}/govmm/kernel}
package=linux-source-6.1
jobs=${GOVMM_KERNEL_JOBS:-$(nproc)}

say() { echo "test kernel: $*" >&2; }
die() { say "$*"; exit 1; }

[ -f "$here/config.$variant" ] || die "no variant \"$variant\": acpi, noacpi, poison and disk exist"
[ "$variant" = disk ] && more=$here/patch/int80.c || more=
key=$(cat "$here/build.sh" "$here/config" "$here/config.$variant" $more | sha256sum | cut -c1-16)
out=$cache/$variant-$key

if [ ! -f "$out/vmlinux" ]; then
	mkdir -p "$cache"
	exec 9>"$cache/lock"
	flock 9
fi
if [ ! -f "$out/vmlinux" ]; then
	for tool in gcc make flex bison bc xz; do
		command -v $tool >/dev/null || die "needs $tool: apt-get install gcc make flex bison bc xz-utils libelf-dev"
	done
	work=$cache/work-$variant
	rm -rf "$work"
	mkdir -p "$work"
	log=$work/build.log

	# The source: the package where it is installed, else fetched by apt.
	tarball=/usr/src/$package.tar.xz
	if [ ! -f "$tarball" ]; then
		say "fetching the package $package"
		(cd "$work" && apt-get download "$package" >"$log" 2>&1 && dpkg-deb -x "$package"_*.deb deb) ||
			die "cannot fetch the package $package (see $log): run apt-get update, or apt-get install $package"
		tarball=$work/deb/usr/src/$package.tar.xz
	fi
	say "building $variant with $jobs jobs; this takes some minutes ($log)"
	mkdir "$work/source"
	tar -C "$work/source" --strip-components=1 \
		--exclude='*/drivers/gpu/drm/amd/include/asic_reg/*' -xf "$tarball"
	cd "$work/source"

	# INT3 in ring 0 is an instruction that software KVMs do not know.
	patched=arch/x86/kernel/alternative.c
	sed -i 's/^\tint3_selftest();$/\t\/\* int3_selftest(): not here \*\//' $patched
	grep -q 'int3_selftest(): not here' $patched || die "$patched has no call of int3_selftest"

	# Nor FWAIT, with which each thread ends: the first ones, idle workers, after five minutes.
	patched=arch/x86/kernel/fpu/core.c
	sed -i 's/asm volatile("1: fwait\\n"$/asm volatile("1: nop\\n"/' $patched
	grep -q '"1: nop' $patched || die "$patched has no FWAIT in fpu__drop"

	# BLAKE2s tests itself with 2 million instructions of ring 0, which there are emulated.
	patched=lib/crypto/blake2s.c
	sed -i 's/WARN_ON(!blake2s_selftest())/0 \/* blake2s_selftest(): not here *\//' $patched
	grep -q 'blake2s_selftest(): not here' $patched || die "$patched has no call of blake2s_selftest"

	# A tick that takes longer than a tick's time, on a slow machine, is followed by all that
	# were missed: the processor never gets out of that, and boots no further. Drop them.
	patched=kernel/time/tick-common.c
	sed -i 's/next = ktime_add_ns(next, TICK_NSEC)/next = ktime_add_ns(ktime_get(), TICK_NSEC)/' $patched
	[ "$(grep -c 'ktime_add_ns(ktime_get(), TICK_NSEC)' $patched)" = 2 ] || die "$patched has not the two places to change"

	# Magic SysRq over the serial line by ^O and a key, as on hvc0, in the place
	# of a line break, which is not to be had everywhere.
	patched=include/linux/serial_core.h
	sed -i 's/^\tif (!port->sysrq)$/\tif (ch == 0x0f \&\& port->has_sysrq \&\& !port->sysrq) {\n\t\tport->sysrq = jiffies + SYSRQ_TIMEOUT;\n\t\treturn 1;\n\t}\n&/' $patched
	[ "$(grep -c 'ch == 0x0f' $patched)" = 2 ] || die "$patched has not the two functions to change"

	# Where ring 0 is emulated, INT in ring 3 is an invalid instruction.
	if [ "$variant" = disk ]; then
		patched=arch/x86/kernel/traps.c
		sed -i -e "/^DEFINE_IDTENTRY_RAW(exc_invalid_op)$/e cat '$here/patch/int80.c'" \
			-e 's/^\thandle_invalid_op(regs);$/\tif (!int80_instead(regs))\n\t&/' $patched
		[ "$(grep -c int80_instead $patched)" = 2 ] || die "$patched has not the two places to change"
	fi

	{
		make tinyconfig
		cat "$here/config" "$here/config.$variant" >>.config
		make olddefconfig
	} >>"$log" 2>&1 || die "configuration failed: $(tail -1 "$log")"
	lost=$(grep -h CONFIG_ "$here/config" "$here/config.$variant" | while read -r line; do
		case $line in
		*' is not set') name=${line#\# }; ! grep -q "^${name%% *}=" .config || echo "$line" ;;
		*) grep -qxF "$line" .config || echo "$line" ;;
		esac
	done)
	[ -z "$lost" ] || die "the kernel's configuration did not take: $lost"

	export KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=govmm KBUILD_BUILD_HOST=test
	nice -n 19 make -j"$jobs" vmlinux bzImage >>"$log" 2>&1 || die "the build failed: $(grep -m1 -i error "$log")"
	mkdir "$work/out"
	cp arch/x86/boot/bzImage .config "$log" "$work/out/"
	strip --strip-debug -o "$work/out/vmlinux" vmlinux
	cd "$cache"
	rm -rf "$out"
	mv "$work/out" "$out"
	rm -rf "$work"
	say "built $out"
fi
echo "$out/vmlinux"
