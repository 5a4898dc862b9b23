#!/bin/bash
# Runs each fuzz target, and says how many inputs were tried in all: test/fuzz.sh SECONDS
set -euo pipefail

out=$(mktemp)
trap 'rm -f "$out"' EXIT

# fuzz TARGET SECONDS. If the time ends while an input is tried, go test sometimes
# reports a failure without an input. Such a run is repeated.
fuzz() {
	local try
	for try in 1 2 3; do
		go test -run '^$' -fuzz "^$1\$" -fuzztime "$2s" -fuzzminimizetime 10x -parallel 2 . 2>&1 | tee "$out" && return 0
		if grep -q 'Failing input written' "$out" || ! grep -qx ' *context deadline exceeded' "$out"; then
			return 1
		fi
	done
	return 1
}

count=0 total=0
dirs=$(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.Dir}}{{end}}' ./...)
for dir in $dirs; do
	grep -qs '^func Fuzz' "$dir"/*_test.go || continue
	cd "$dir"
	targets=$(go test -list '^Fuzz' . | grep '^Fuzz')
	for target in $targets; do
		echo "fuzz: $target in $dir for $1 s"
		fuzz "$target" "$1"
		tried=$(sed -n 's/.*execs: \([0-9]*\).*/\1/p' "$out" | tail -1)
		count=$((count + 1)) total=$((total + ${tried:-0}))
	done
done
echo "fuzz: $total executions of $count targets"
