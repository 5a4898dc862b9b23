package api_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/hosttls"
	"github.com/govmm/govmm/vmm/api"
)

// TestTLSArrives: PEM texts become the migration's configuration; what is wrong with them
// is one line with status 400, which never has the key in it.
func TestTLSArrives(t *testing.T) {
	vm := &fakeVM{migration: newFakeMigration()}
	vm.migration.end(migrate.Result{Status: "completed"})
	c, _ := serve(t, t.TempDir(), "", vm)
	good := credentials(t)
	for _, tc := range []struct{ to, name, want string }{
		{"beta:7000", "", "beta"}, {"10.0.0.2:7000", "", "10.0.0.2"}, {"10.0.0.2:7000", "beta", "beta"}, {"unix:/run/x", "beta", "beta"},
	} {
		pem := good
		pem.ServerName = tc.name
		if _, err := c.Migrate(context.Background(), api.MigrateRequest{To: tc.to, TLS: &pem}, nil); err != nil {
			t.Fatal(err)
		}
		got := vm.opt.TLS
		if got == nil || got.ServerName != tc.want || got.MinVersion != tls.VersionTLS13 || len(got.Certificates) != 1 || got.RootCAs == nil || vm.addr != tc.to {
			t.Errorf("%s, %q: %+v to %s", tc.to, tc.name, got, vm.addr)
		}
		if _, err := c.Estimate(context.Background(), api.EstimateRequest{MigrateRequest: api.MigrateRequest{To: tc.to, TLS: &pem}}); err != nil || vm.opt.TLS == nil {
			t.Errorf("estimate: %v", err)
		}
	}
	other := credentials(t)
	for name, change := range map[string]func(*api.MigrateRequest){
		"key.pem: ":      func(r *api.MigrateRequest) { r.TLS.Key = other.Key },
		"cert.pem: ":     func(r *api.MigrateRequest) { r.TLS.Cert = r.TLS.Key },
		"ca.pem: ":       func(r *api.MigrateRequest) { r.TLS.CA = "" },
		"at most":        func(r *api.MigrateRequest) { r.TLS.Key += strings.Repeat("\n", hosttls.MaxFile) },
		"server name":    func(r *api.MigrateRequest) { r.TLS.ServerName = "*" },
		"has no host":    func(r *api.MigrateRequest) { r.To = "unix:/run/x" },
		"absolute path":  func(r *api.MigrateRequest) { r.To = "unix:x" },
		"body: must be ": func(r *api.MigrateRequest) { r.TLS.CA = strings.Repeat("x", 300<<10) },
	} {
		pem := good
		req := api.MigrateRequest{To: "beta:7000", TLS: &pem}
		change(&req)
		_, err := c.Migrate(context.Background(), req, nil)
		if err == nil || !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 300 || leaks(err.Error(), pem.Key) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if s := fmt.Sprintf("%v %+v %s", good, good, good); leaks(s, good.Key) {
		t.Error("the key is printed")
	}
}

// leaks reports whether s has a line of a key's PEM.
func leaks(s, key string) bool {
	for line := range strings.Lines(key) {
		if line = strings.TrimSpace(line); len(line) > 20 && strings.Contains(s, line) {
			return true
		}
	}
	return false
}

func credentials(t *testing.T) api.TLS {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	now := time.Now()
	err := hosttls.CreateCA(dir, now.Add(-time.Hour), now.Add(time.Hour))
	if err == nil {
		var ca *hosttls.CA
		if ca, err = hosttls.OpenCA(dir); err == nil {
			err = ca.Issue(filepath.Join(dir, "alpha"), []string{"alpha"}, now.Add(-time.Hour), now.Add(time.Hour))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	c, err := hosttls.ReadDir(filepath.Join(dir, "alpha"))
	if err != nil {
		t.Fatal(err)
	}
	return api.TLS{CA: string(c.CA), Cert: string(c.Cert), Key: string(c.Key)}
}
