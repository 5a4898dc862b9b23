package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/migrate/hosttls"
)

// TestCerts: what the commands make is what --tls-dir takes, and nothing is overwritten.
func TestCerts(t *testing.T) {
	c := newCLI(t)
	ca := filepath.Join(c.dir, "ca")
	must := func(words string, args ...string) {
		t.Helper()
		exit, stdout, stderr := c.run(args...)
		if exit != 0 || stdout != "" || !strings.Contains(stderr, words) || strings.Contains(stderr, "PRIVATE") {
			t.Fatalf("govmm %s: exit %d, %q, %q", strings.Join(args, " "), exit, stdout, stderr)
		}
	}
	refuses := func(words string, args ...string) {
		t.Helper()
		exit, stdout, stderr := c.run(args...)
		if exit != exitFailed || stdout != "" {
			t.Errorf("govmm %s: exit %d, %q", strings.Join(args, " "), exit, stdout)
		}
		oneLine(t, stderr, words)
	}
	refuses("certs init "+ca, "certs", "issue", ca, "alpha")
	must("has an authority", "certs", "init", ca)
	key, err := os.ReadFile(filepath.Join(ca, hosttls.CAKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	refuses("exists", "certs", "init", ca)
	must("of alpha, 10.0.0.1", "certs", "issue", ca, "alpha,10.0.0.1", "beta.example", "--days", "7")
	for _, host := range []string{"alpha", "beta.example"} {
		if _, err := hosttls.NewServer(filepath.Join(ca, host), nil, nil); err != nil {
			t.Error(err)
		}
	}
	cert, err := os.ReadFile(filepath.Join(ca, "alpha", hosttls.CertFile))
	if err != nil {
		t.Fatal(err)
	}
	refuses("exists", "certs", "issue", ca, "alpha")
	for path, was := range map[string][]byte{filepath.Join(ca, hosttls.CAKeyFile): key, filepath.Join(ca, "alpha", hosttls.CertFile): cert} {
		if now, err := os.ReadFile(path); err != nil || string(now) != string(was) {
			t.Errorf("%s has changed: %v", path, err)
		}
	}
	refuses("not one of an authority", "certs", "issue", hostAsCA(t, ca), "gamma")
}

// hostAsCA is a directory where a host's certificate is in the place of an authority's.
func hostAsCA(t *testing.T, ca string) string {
	t.Helper()
	dir := t.TempDir()
	for from, to := range map[string]string{hosttls.CertFile: hosttls.CAFile, hosttls.KeyFile: hosttls.CAKeyFile} {
		b, err := os.ReadFile(filepath.Join(ca, "alpha", from))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, to), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
