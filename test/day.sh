#!/bin/bash
# A day with govmm, from its package alone: two hosts with certificates, a Linux guest out of a
# cloud image, moved with its disk under ping while govmm top shows it, and a report.
#
#	test/day.sh PACKAGE.deb IMAGE.qcow2 GUEST-ADDRESS DIR
#
# The hosts are two network namespaces of this machine, alpha (10.9.0.1) and beta (10.9.0.3), each with
# directories of its own in DIR; the guest has GUEST-ADDRESS in 10.9.0.0/24 by itself. What each step
# printed is kept in DIR, as NN-STEP.txt. Needs root, for the namespaces and taps, and /dev/kvm.
# Status 0: all of it was as it should be.
set -euo pipefail
deb=$(realpath "$1") image=$(realpath "$2") guest=$3 dir=$(realpath "$4")
patience=${PATIENCE:-1200} # seconds that the guest may take to start
id=$$
n=0

step() { # NAME WORDS: what is printed goes into a file from here on
	exec >&3 2>&4
	n=$((n + 1))
	log=$(printf '%s/%02d-%s.txt' "$dir" $n "$1")
	echo "== ${*:2} ($log)"
	exec >>"$log" 2>&1
}
exec 3>&1 4>&2

end() {
	status=$?
	exec >&3 2>&4
	set +e
	[ $status = 0 ] || { echo "day.sh: failed in this step, with status $status:"; tail -n 30 "$log"; }
	for host in alpha beta; do
		[ ! -e "$dir/$host" ] || on $host govmm stop --force web 2>/dev/null
		ip netns pids gv$id$host 2>/dev/null | xargs -r kill 2>/dev/null
	done
	wait
	for host in alpha beta; do ip netns del gv$id$host 2>/dev/null; done
	exit $status
}
trap end EXIT

on() { # HOST COMMAND...: as root of that host
	local host=$1
	shift
	env -C "$dir/$host" PATH="$dir/package/usr/bin:$PATH" XDG_RUNTIME_DIR="$dir/$host" XDG_STATE_HOME="$dir/$host/state" XDG_DATA_HOME="$dir/$host/data" \
		ip netns exec gv$id$host "$@"
}

await() { # WHAT SECONDS COMMAND...: until it succeeds
	local what=$1 end=$((SECONDS + $2))
	shift 2
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $end ] || { echo "day.sh: no $what"; return 1; }
		sleep 0.5
	done
}

step package "the package, and nothing else, is unpacked"
dpkg-deb -x "$deb" "$dir/package"
mkdir -p "$dir/alpha" "$dir/beta/disks"

step hosts "two hosts with a cable between them"
for host in alpha beta; do
	ip netns add gv$id$host
	ip -n gv$id$host link set lo up
	ip -n gv$id$host link add br0 type bridge
	ip -n gv$id$host link set br0 up
done
ip -n gv${id}alpha addr add 10.9.0.1/24 dev br0
ip -n gv${id}beta addr add 10.9.0.3/24 dev br0
ip link add cable netns gv${id}alpha type veth peer name cable netns gv${id}beta
for host in alpha beta; do
	ip -n gv$id$host link set cable master br0
	ip -n gv$id$host link set cable up
done
await "way from alpha to beta" 30 on alpha ping -c 1 -W 1 10.9.0.3
on alpha govmm version

step certificates "an authority, and a certificate for each host"
on alpha govmm certs init ca
on alpha govmm certs issue ca alpha,10.9.0.1
on alpha govmm certs issue ca beta,10.9.0.3
cp -r "$dir/alpha/ca/alpha" "$dir/alpha/tls"
mv "$dir/alpha/ca/beta" "$dir/beta/tls"

step describe "the guest is described in a file"
cat >"$dir/alpha/web.yaml" <<EOF
name: web
image: $image
memory: 256M
net: {tap: tap0, bridge: br0}
serial: file:serial.log
EOF
on alpha govmm image info "$image"
on alpha govmm config web.yaml

step start "it starts at alpha, from a disk that is made of the image, and answers ping"
on alpha govmm run web --config web.yaml >"$dir/alpha/web.log" 2>&1 &
await "API of the VM" 60 on alpha govmm info web
await "answer of the guest" "$patience" on alpha ping -c 1 -W 1 "$guest"
on alpha govmm ps
on alpha govmm info web
cat "$dir/alpha/web.log"

step receive "beta waits for it, by TLS from alpha only, with a directory for its disk"
cat >"$dir/beta/web.yaml" <<EOF
listen: 10.9.0.3:7000
tls-dir: tls
tls-allow: alpha
disk-dir: disks
net: {tap: tap0, bridge: br0}
serial: file:serial.log
EOF
on beta govmm config --receive web.yaml
on beta govmm receive web --config web.yaml >"$dir/beta/web.log" 2>&1 &
await "receiver" 60 grep -q "listening on 10.9.0.3:7000" "$dir/beta/web.log"

step check "would it go there?"
on alpha govmm migrate web --to 10.9.0.3:7000 --tls-dir tls --copy-disks --check

step move "it moves, with its disk, under ping, while govmm top looks on"
on alpha ping -n -i 0.2 "$guest" >"$dir/ping.txt" &
ping=$!
on alpha govmm top --interval 500ms --count 1200 >"$dir/top.txt" 2>&1 &
top=$!
await "ping before the move" 60 grep -q "icmp_seq=10 " "$dir/ping.txt"
on alpha govmm migrate web --to 10.9.0.3:7000 --tls-dir tls --copy-disks --bandwidth-limit 16M --downtime-limit 3s --report "$dir/report.html"
before=$(grep -c "icmp_seq=" "$dir/ping.txt")
await "answers after the move" 120 sh -c "[ \$(grep -c icmp_seq= '$dir/ping.txt') -ge $((before + 10)) ]"
kill -INT $(ip netns pids gv${id}alpha | grep -x -F -f <(pgrep -x ping)) 2>/dev/null || kill -INT $ping
kill $top 2>/dev/null || true
wait $ping || true # it says so if an answer was lost
tail -n 3 "$dir/ping.txt"
cat "$dir/beta/web.log"

step afterwards "it runs at beta, on its own copy of the disk, and all is told"
on beta govmm ps
on beta govmm ps | grep -E '^web +running '
! on alpha govmm info web
on alpha govmm migrations | tee -a /dev/stderr | grep -E ' web +10.9.0.3:7000 .* completed '
grep -E 'migrating .* to 10.9.0.3:7000' "$dir/top.txt"
cmp "$dir/alpha/data/govmm/web.raw" "$dir/beta/disks/web.raw"
! on alpha govmm run old --disk "$dir/alpha/data/govmm/web.raw" --serial null # it has moved away
grep -q '<svg' "$dir/report.html"
lost=$(sed -n 's/.* \([0-9.]*\)% packet loss.*/\1/p' "$dir/ping.txt")
echo "$lost% of the pings were lost"
awk -v lost="$lost" 'BEGIN { exit !(lost < 20) }'

step stop "the guest is stopped"
on beta govmm stop web --timeout 30s --then-force
await "end at beta" 60 sh -c "! [ -e '$dir/beta/govmm/web.sock' ]"

exec >&3 2>&4
echo "== done"
