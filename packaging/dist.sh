#!/bin/sh
# Makes what is released of bin/govmm in a directory: packaging/dist.sh DIR. All of it has the same
# bytes wherever the same commit is built by the same Go (test: TestDistIsReproducible).
set -eu
umask 022
out=${1:?expected a directory}
mkdir -p "$out"
rm -f "$out"/govmm* "$out"/SHA256SUMS
install -m 755 bin/govmm "$out/govmm-linux-amd64"
packaging/deb.sh "$out"
# What is in it, with licences: CycloneDX. It warns that it finds no licence of govmm itself, which is
# in no cache of modules. Of what differs with each run, the serial number is left out, the time is
# the commit's, and -trimpath leaves the tool's own checksum as it is elsewhere.
sbom=$out/govmm.cdx.json
GOFLAGS=-trimpath GOPROXY=off go tool -modfile=packaging/tools/go.mod cyclonedx-gomod bin -json -licenses -std -noserial \
	-output-version 1.5 -version "$(packaging/version.sh)" -output "$sbom" "$out/govmm-linux-amd64"
time=$(date -u -d "@$(git log -1 --format=%ct)" +%Y-%m-%dT%H:%M:%SZ)
sed -i "s/^    \"timestamp\": \".*\",\$/    \"timestamp\": \"$time\",/" "$sbom"
grep -q "\"timestamp\": \"$time\"" "$sbom"
cd "$out"
sha256sum govmm* >SHA256SUMS
