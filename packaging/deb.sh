#!/bin/sh
# Makes the Debian package of bin/govmm in a directory: packaging/deb.sh DIR. It has the same bytes
# wherever the same commit is packaged by the same Go.
set -eu
umask 022
out=${1:?expected a directory}
export DEB_VERSION=${DEB_VERSION:-$(packaging/version.sh)}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
STAGE=$(mktemp -d)
chmod 755 "$STAGE"
export STAGE
trap 'rm -rf "$STAGE"' EXIT

put() { # MODE FILE TO
	install -D -m "$1" "$2" "$STAGE$3"
}
put 755 bin/govmm /usr/bin/govmm
for unit in govmm@ govmm-receive@; do
	put 644 packaging/$unit.service /usr/lib/systemd/system/$unit.service
done
put 644 packaging/sysusers.conf /usr/lib/sysusers.d/govmm.conf
put 644 packaging/tmpfiles.conf /usr/lib/tmpfiles.d/govmm.conf
put 644 packaging/sysctl.conf /usr/lib/sysctl.d/60-govmm.conf
put 644 packaging/60-govmm.rules /usr/lib/udev/rules.d/60-govmm.rules
put 644 packaging/lintian-overrides /usr/share/lintian/overrides/govmm

man=$STAGE/usr/share/man/man1
mkdir -p "$man"
go run -tags manpages ./cmd/govmm "$man" "$DEB_VERSION" "$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%d)"
mkdir -p "$STAGE/usr/share/bash-completion/completions" "$STAGE/usr/share/zsh/vendor-completions" "$STAGE/usr/share/fish/vendor_completions.d"
bin/govmm completion bash >"$STAGE/usr/share/bash-completion/completions/govmm"
bin/govmm completion zsh >"$STAGE/usr/share/zsh/vendor-completions/_govmm"
bin/govmm completion fish >"$STAGE/usr/share/fish/vendor_completions.d/govmm.fish"

doc=$STAGE/usr/share/doc/govmm
put 644 packaging/copyright /usr/share/doc/govmm/copyright
put 644 CHANGELOG.md /usr/share/doc/govmm/NEWS.md
for page in docs/*.md docs/*.json; do
	put 644 "$page" "/usr/share/doc/govmm/$(basename "$page")"
done
packaging/third-party.sh >"$doc/third-party.txt"
cat >"$doc/changelog" <<EOF
govmm ($DEB_VERSION) unstable; urgency=medium

  * The changes are in NEWS.md.gz.

 -- The authors of govmm <govmm@users.noreply.github.com>  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
EOF
find "$doc" -type f ! -name copyright ! -name '*.json' -size +4k -exec gzip -9n {} +
gzip -9n "$man"/*.1
[ ! -e "$doc/changelog" ] || gzip -9n "$doc/changelog"

mkdir -p "$out"
go tool -modfile=packaging/tools/go.mod nfpm package --config packaging/nfpm.yaml --packager deb --target "$out/govmm_${DEB_VERSION}_amd64.deb"
