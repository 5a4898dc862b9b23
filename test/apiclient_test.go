package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
)

// A client that a public generator makes of docs/openapi.json, and that has nothing else of
// govmm, drives a VM: test/client.
func TestGeneratedClient(t *testing.T) {
	needKVM(t)
	dir := t.TempDir()
	for _, name := range []string{"go.mod", "go.sum", "main.go", "oapi-codegen.yaml"} {
		data, err := os.ReadFile(filepath.Join("client", name))
		testenv.Check(t, err)
		testenv.Check(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	document, err := filepath.Abs("../docs/openapi.json")
	testenv.Check(t, err)
	tool := func(args ...string) {
		t.Helper()
		cmd := exec.Command("go", args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	tool("tool", "oapi-codegen", "-config", "oapi-codegen.yaml", document)
	tool("vet", ".")
	tool("build", "-o", "client", ".")

	h := newHost(t)
	vm := h.start("run", "db", "--memory", "64M", "--disk", "path="+newDisk(t, h.dir), "--cmdline", "fill=16M tick=1")
	vm.out.awaitText(t, 0, "tick 1 ")
	_, addr := h.receive("dst", "--disk", "path="+h.dir+"/disk.img")
	out, err := exec.Command(filepath.Join(dir, "client"), filepath.Join(h.dir, "govmm", "db.sock"), addr).CombinedOutput()
	if err != nil {
		t.Fatalf("client: %v\n%s", err, out)
	}
	at := 0
	for _, want := range []string{"info: db is running, 1 vCPUs, 67108864 bytes, 1 disks", "pause: paused", "resume: running", "problem: address \"nowhere\": expected HOST:PORT",
		"record: generated of db to " + addr, "event: state running", "event: state paused", "event: phase precopy", "event: round 0 sent ", "event: phase completed", "result: completed, "} {
		i := strings.Index(string(out)[at:], want)
		if i < 0 {
			t.Fatalf("no %q there in\n%s", want, out)
		}
		at += i
	}
	if exit := vm.wait(); exit != 0 {
		t.Errorf("the source: exit %d", exit)
	}
	if i := h.info("dst"); i.State != "running" {
		t.Errorf("the guest is %s", i.State)
	}
	if out := h.must("migrations", "generated"); !strings.Contains(out, "completed: ") {
		t.Errorf("its record:\n%s", out)
	}
}

// newDisk makes an image of 1 MiB.
func newDisk(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "disk.img")
	testenv.Check(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	return path
}
