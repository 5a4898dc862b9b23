package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestConfigOfARunningVM: a VM is started from a file, tells its configuration, moves, and
// tells it there; what it tells starts another one.
func TestConfigOfARunningVM(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	dir, image := t.TempDir(), newImage(t, mib)
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := write("vm.yaml", "name: cf\nmemory: 64M\ncmdline: dirty=1M tick=0.3\ndisk: {path: "+image+", id: root, readonly: true}\nballoon: false\n")
	p := h.start("run", "--config", file, "--memory", "32M")
	p.out.awaitText(t, 0, "tick 1 ")
	here := h.must("config", "--from", "cf")
	for _, want := range []string{"name: cf\n", "memory: 32M\n", "balloon: false\n", "id=root"} {
		if !strings.Contains(here, want) {
			t.Errorf("%q is not in\n%s", want, here)
		}
	}
	there, addr := h.receive("cg", "--config", write("here.yaml", "disk: {root: {path: "+image+"}}\n"))
	if r, exit := h.migrate("cf", "--to", addr); exit != 0 {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	there.out.awaitText(t, 0, "tick ")
	moved := h.must("config", "--from", "cg")
	for _, want := range []string{"name: cg\n", "memory: 32M\n", "cmdline: dirty=1M tick=0.3\n", "balloon: false\n", "id=root"} {
		if !strings.Contains(moved, want) {
			t.Errorf("%q is not in\n%s", want, moved)
		}
	}
	if strings.Contains(moved, "listen") || strings.Contains(moved, "balloon: true") {
		t.Errorf("it has what is not the guest's:\n%s", moved)
	}
	h.must("stop", "--force", "cg")
	there.wait()
	again := h.start("run", "--config", write("again.yaml", moved))
	again.out.awaitText(t, 0, "tick 1 ")
	h.must("stop", "--force", "cg")
}
