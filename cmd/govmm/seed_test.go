package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio/blk"
)

// What cloud-init would ignore, or nobody should see, is refused before a VM is made.
func TestSeedFlags(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		testenv.Check(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	for _, c := range []struct{ flag, value, want string }{
		{"--cloud-init", file("none", "packages: [a]\n"), "expected #cloud-config"},
		{"--cloud-init", file("bad", "#cloud-config\na: [\n"), "line 2"},
		{"--network-config", file("net", "version: 7\n"), "expected version: 1 or version: 2"},
		{"--ssh-key", file("private", "-----BEGIN OPENSSH PRIVATE KEY-----\n"), "private key"},
		{"--ssh-key", filepath.Join(dir, "missing"), "no such file"},
		{"--hostname", "a b", "host name"},
	} {
		code, _, errs := command("run", "x", c.flag, c.value)
		if code != exitUsage || !strings.Contains(errs, c.want) || !strings.Contains(errs, c.flag) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s %s: %d, %q; want %q", c.flag, c.value, code, errs, c.want)
		}
	}
	f := seedFlags{hostname: "web"}
	testenv.Check(t, f.read())
	d, err := f.device("vm1")
	testenv.Check(t, err)
	if s, ok := d.(*blk.SeedSpec); !ok || s.Validate() != nil {
		t.Errorf("%v", d)
	}
	none := seedFlags{}
	testenv.Check(t, none.read())
	if d, err := none.device("vm1"); d != nil || err != nil {
		t.Errorf("without flags: %v, %v", d, err)
	}
}
