//go:build accept

package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/test/kernel"
)

// cloudImage makes a compressed qcow2 image with a Linux that boots by its boot loader's
// configuration, and answers ping at an address. It stands for a distribution's cloud image, whose
// kernel does not run where ring 0 is emulated.
func cloudImage(t *testing.T, address string) string {
	t.Helper()
	testenv.NeedTools(t, "qemu-img")
	vmlinux, err := kernel.Build(kernel.NoACPI)
	testenv.Check(t, err)
	elf, err := os.ReadFile(vmlinux)
	testenv.Check(t, err)
	program, err := kernel.Program("memhog", 0)
	testenv.Check(t, err)
	const version = "6.1.0-govmm"
	raw := bootImage(t, map[string]string{
		"etc/fstab": "", "usr/x": "", "srv/content": strings.Repeat("what the guest keeps\n", 500_000),
		"boot/vmlinuz-" + version: string(elf), "boot/initrd.img-" + version: string(kernel.Initramfs(kernel.File{Name: "init", Data: program})),
		"boot/grub/grub.cfg": fmt.Sprintf("set default=0\nmenuentry 'Linux' --id linux {\n\tlinux /boot/vmlinuz-%s console=ttyS0 %s ip=%s::10.9.0.1:255.255.255.0::eth0:off -- size=32M idle=100\n\tinitrd /boot/initrd.img-%[1]s\n}\n",
			version, kernel.Cmdline, address),
	})
	image := filepath.Join(t.TempDir(), "cloud.qcow2")
	output(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image)
	return image
}

// TestDay runs test/day.sh.
func TestDay(t *testing.T) {
	needKVM(t)
	needRoot(t)
	built, dir := t.TempDir(), t.TempDir()
	makeInto(t, "deb", built)
	cmd := exec.Command("./day.sh", oneFile(t, built, "govmm_*.deb"), cloudImage(t, everyDeviceIP), everyDeviceIP, dir)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil || !strings.HasSuffix(string(out), "== done\n") {
		t.Errorf("day.sh: %v", err)
	}
	for _, name := range []string{"08-move.txt", "09-afterwards.txt"} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		}
		t.Logf("%s:\n%s", name, text)
	}
}
