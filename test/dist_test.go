//go:build accept

package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestDistIsReproducible: two clones in two directories, one built from nothing, are released with the
// same bytes.
func TestDistIsReproducible(t *testing.T) {
	var sums []string
	for i, name := range []string{"one", "another/place"} {
		dir := filepath.Join(t.TempDir(), name)
		output(t, "git", "clone", "-q", "..", dir)
		cmd := exec.Command("make", "-C", dir, "dist")
		if cmd.Env = os.Environ(); i > 0 {
			cmd.Env = append(cmd.Env, "GOCACHE="+filepath.Join(t.TempDir(), "cache"))
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("make dist in %s: %v\n%s", dir, err, out)
		}
		text, err := os.ReadFile(filepath.Join(dir, "dist/SHA256SUMS"))
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, string(text))
		if out := output(t, "sh", "-c", "cd "+dir+"/dist && sha256sum -c SHA256SUMS && ls"); !strings.Contains(out, "govmm.cdx.json: OK") || strings.Count(out, ": OK\n") != 3 {
			t.Errorf("SHA256SUMS: %s", out)
		}
	}
	if sums[0] != sums[1] {
		t.Errorf("two builds differ:\n%s\n%s", sums[0], sums[1])
	}
}
