#!/bin/sh
# The version of the package, of what git describe says: 0.1.0 at the tag v0.1.0, 0.1.0+3.g0123456
# three commits later; without a tag 0.1.0~N.g0123456, before the first release, N commits.
set -eu
release=$(sed -n 's/^const release = "\(.*\)"$/\1/p' cmd/govmm/version.go)
version=$(git describe --tags --match 'v[0-9]*' 2>/dev/null | sed 's/^v//; s/-\([0-9]*\)-g/+\1.g/; s/-/~/g') || true
if [ -z "$version" ]; then
	version="$release~$(git rev-list --count HEAD).g$(git rev-parse --short=7 HEAD)"
fi
[ -z "$(git status --porcelain --untracked-files=no)" ] || version="$version+dirty"
echo "$version"
