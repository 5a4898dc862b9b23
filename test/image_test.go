package test

import (
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/mempage"
)

// qcow2Of makes a compressed image with a backing file, of the content of a raw file.
func qcow2Of(t testing.TB, raw string) string {
	t.Helper()
	testenv.NeedTools(t, "qemu-img")
	below, top := filepath.Join(filepath.Dir(raw), "below.qcow2"), filepath.Join(filepath.Dir(raw), "top.qcow2")
	for _, args := range [][]string{{"convert", "-c", "-f", "raw", "-O", "qcow2", raw, below},
		{"create", "-f", "qcow2", "-b", "below.qcow2", "-F", "qcow2", top}} {
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %q: %v\n%s", args, err, out)
		}
	}
	return top
}

// TestEphemeralDisk: a guest in the sandbox writes, flushes, reads and checks an ephemeral
// disk whose image is qcow2 with a backing file. It is neither migrated nor saved: both
// are refused by the disk's name, and the guest goes on. The image stays as it was.
func TestEphemeralDisk(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const size = 2 * mib
	image := qcow2Of(t, newImage(t, 3*size))
	before, err := os.ReadFile(image)
	testenv.Check(t, err)
	if _, errs, exit := h.run("run", "e", "--disk", "path="+image); exit == 0 || !strings.Contains(errs, "govmm image import ") || !strings.Contains(errs, "format=qcow2,ephemeral") {
		t.Errorf("a qcow2 image as a raw disk: exit %d, %q", exit, errs)
	}
	vm := h.start("run", "e", "--memory", "64M", "--disk", "path="+image+",ephemeral", "--cmdline",
		"fill=8M dirty=2M rate=50 verify=1 tick=0.5 disk=2M drate=0")
	awaitDisk(t, vm.out, 0, size/mempage.Size)
	there, addr := h.receive("f", "--disk", newImage(t, 3*size))
	if r, exit := h.migrate("e", "--to", addr); exit == 0 || !strings.Contains(r.Error, "top.qcow2 is ephemeral") {
		t.Errorf("migrate: exit %d, %+v", exit, r)
	}
	if r, exit := h.snapshot("e", "--to", filepath.Join(t.TempDir(), "saved")); exit == 0 || !strings.Contains(r.Error, "top.qcow2 is ephemeral") {
		t.Errorf("snapshot: exit %d, %+v", exit, r)
	}
	there.kill(9)
	awaitDisk(t, vm.out, vm.out.len(), size/mempage.Size)
	if after, err := os.ReadFile(image); err != nil || sha256.Sum256(after) != sha256.Sum256(before) {
		t.Errorf("the image has changed (%v)", err)
	}
	h.must("stop", "--force", "e")
}
