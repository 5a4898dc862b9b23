#!/bin/bash
# Runs every fuzz target for a while: test/fuzz.sh SECONDS
set -euo pipefail

for dir in $(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.Dir}}{{end}}' ./...); do
	grep -qs '^func Fuzz' "$dir"/*_test.go || continue
	for target in $(cd "$dir" && go test -list '^Fuzz' . | grep '^Fuzz'); do
		echo "fuzz: $target in ${dir#"$PWD"/} for $1 s"
		(cd "$dir" && go test -run '^$' -fuzz "^$target\$" -fuzztime "$1s" -parallel 2 .)
	done
done
