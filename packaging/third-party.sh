#!/bin/sh
# Prints the licences and notices of the modules that bin/govmm contains, and of Go.
set -eu
one() { # NAME DIR
	printf '%s\n%s\n%s\n\n' "========================================" "$1" "========================================"
	found=
	for file in "$2"/LICEN[CS]E* "$2"/License* "$2"/COPYING* "$2"/NOTICE* "$2"/PATENTS; do
		[ -f "$file" ] || continue
		found=yes
		cat "$file"
		echo
	done
	[ -n "$found" ] || { echo "third-party.sh: $1 has no licence in $2" >&2; exit 1; }
}
one "Go $(go env GOVERSION)" "$(go env GOROOT)"
go list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}} {{.Dir}}{{end}}{{end}}' ./cmd/govmm | sort -u | while read -r path version dir; do
	one "$path $version" "$dir"
done
