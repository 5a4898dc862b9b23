#!/bin/bash
# Runs every fuzz target for a while: test/fuzz.sh SECONDS
set -euo pipefail

dirs=$(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.Dir}}{{end}}' ./...)
for dir in $dirs; do
	grep -qs '^func Fuzz' "$dir"/*_test.go || continue
	cd "$dir"
	targets=$(go test -list '^Fuzz' . | grep '^Fuzz')
	for target in $targets; do
		echo "fuzz: $target in $dir for $1 s"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$1s" -fuzzminimizetime 10x -parallel 2 .
	done
done
