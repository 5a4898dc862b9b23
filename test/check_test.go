package test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/migrate"
)

// TestMigrateCheck: migrate --check lists what is in the way at a destination, moves nothing,
// and leaves the destination as it was.
func TestMigrateCheck(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	image := filepath.Join(t.TempDir(), "disk")
	testenv.Check(t, os.WriteFile(image, make([]byte, 4*mib), 0o600))
	src := h.start("run", "a", "--memory", "64M", "--cmdline", "fill=16M dirty=4M rate=1000 verify=1 tick=0.5", "--disk", "path="+image, "--net", "user")
	src.out.awaitTick(t, 0, "a first one", func(tick) bool { return true })
	check := func(to string, args ...string) (migrate.CheckResult, int) {
		t.Helper()
		out, _, exit := h.run(append([]string{"migrate", "a", "--check", "--json", "--to", to}, args...)...)
		var r migrate.CheckResult
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatalf("%q: %v", out, err)
		}
		return r, exit
	}
	_, at := h.receive("bare")
	r, exit := check(at)
	if all := strings.Join(r.Reasons, "; "); exit != 3 || r.Possible || !strings.Contains(all, "--disk") || !strings.Contains(all, "--net") {
		t.Errorf("nothing is given there: exit %d, %+v", exit, r)
	}
	h.must("stop", "bare", "--force")
	if r, exit := check(at); exit != 4 || r.Possible || r.Reason != "unreachable" {
		t.Errorf("nobody is there: exit %d, %+v", exit, r)
	}
	dst, at := h.receive("b", "--disk", "path="+image, "--net", "user")
	for range 2 {
		if r, exit := check(at); exit != 0 || !r.Possible || len(r.Reasons) != 0 || r.RAMBytes != 64*mib {
			t.Errorf("all is given there: exit %d, %+v", exit, r)
		}
	}
	if i := h.info("a"); i.State != "running" || i.Migration.BytesSent != 0 {
		t.Errorf("after the checks: %+v", i)
	}
	if r, exit := h.migrate("a", "--to", at); exit != 0 {
		t.Fatalf("%+v", r)
	}
	dst.out.awaitTick(t, 0, "one at the destination", func(tick) bool { return true })
	if s := dst.err.tail(100); strings.Contains(s, "failed") {
		t.Errorf("a check is a failure for the destination:\n%s", s)
	}
}
