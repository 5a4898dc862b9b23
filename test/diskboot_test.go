package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/guest"
	"github.com/govmm/govmm/internal/testenv"
)

// bootImage makes a disk with a partition whose ext4 has files, and returns its path. It
// is always as large.
func bootImage(t testing.TB, files map[string]string) string {
	t.Helper()
	testenv.NeedTools(t, "mke2fs", "sfdisk")
	dir, tmp := t.TempDir(), t.TempDir()
	for name, text := range files {
		at := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	fs, image := filepath.Join(tmp, "fs.img"), newImage(t, 64*mib)
	for _, c := range [][]string{{"mke2fs", "-q", "-F", "-t", "ext4", "-d", dir, fs, "60M"}, {"sfdisk", "-q", "-X", "gpt", image}} {
		cmd := exec.Command(c[0], c[1:]...)
		cmd.Stdin = strings.NewReader("start=1MiB, type=linux\n")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", c[0], err, out)
		}
	}
	b, err := os.ReadFile(fs)
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, image, b, mib)
	return image
}

// overwrite writes to a file that stays what it is.
func overwrite(t testing.TB, path string, b []byte, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		_, err = f.WriteAt(b, off)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// install puts another system on a disk, as a guest does that installs a kernel.
func install(t testing.TB, image string, files map[string]string) {
	t.Helper()
	b, err := os.ReadFile(bootImage(t, files))
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, image, b, 0)
}

// demoSystem is a disk's files with the demo guest as the kernel, which owns so many MiB.
func demoSystem(owns int) map[string]string {
	const version = "6.1.0-28-cloud-amd64"
	return map[string]string{
		"boot/vmlinuz-" + version: string(guest.ELF), "boot/initrd.img-" + version: strings.Repeat("initrd", 1000), "etc/fstab": "", "usr/x": "",
		"boot/grub/grub.cfg": fmt.Sprintf("set default=0\nmenuentry 'Debian GNU/Linux' --id simple {\n\tlinux /boot/vmlinuz-%s fill=%dM tick=0.5\n\tinitrd /boot/initrd.img-%[1]s\n}\n"+
			"menuentry 'Other' --id other {\n\tlinux /boot/vmlinuz-%[1]s fill=40M tick=0.5 console=hvc0\n}\n", version, owns),
	}
}

// TestBootsFromDisk: without a kernel a VM boots what is on its disk, in the sandbox; what is
// installed there is booted by the next reset, where the VM is by then, and by the next
// start.
func TestBootsFromDisk(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	image := bootImage(t, demoSystem(1))
	p := h.start("run", "b0", "--memory", "64M", "--disk", image)
	p.out.awaitText(t, 0, "owns 1M")
	p.out.awaitTick(t, 0, "any", func(tick) bool { return true })
	if out := h.must("info", "b0"); !strings.Contains(out, "Debian GNU/Linux (/boot/vmlinuz-6.1.0-28-cloud-amd64, of disk "+image+")") {
		t.Errorf("info says %s", out)
	}
	next := func(p *proc, owns int) {
		t.Helper()
		install(t, image, demoSystem(owns))
		at := p.out.len()
		p.typeLine("reboot")
		p.out.awaitText(t, at, fmt.Sprintf("owns %dM", owns))
	}
	next(p, 2)
	next(p, 3)
	for i := range 2 {
		there, addr := h.receive(fmt.Sprintf("b%d", i+1), "--disk", image)
		if r, exit := h.migrate(fmt.Sprintf("b%d", i), "--to", addr); exit != 0 || r.Status != "completed" {
			t.Fatalf("exit %d, %+v", exit, r)
		}
		there.out.awaitTick(t, 0, "any", func(tick) bool { return true })
		next(there, 4+i)
		p = there
	}
	// A disk whose system is broken ends the VM, and says why.
	install(t, image, map[string]string{"etc/fstab": ""})
	p.typeLine("reboot")
	if p.wait() != 1 {
		t.Errorf("a reset without a kernel: exit %d, expected 1", p.exit)
	}
	p.err.awaitText(t, 0, "govmm: receive b2: reset: disk "+image+": boot from it: no kernel: neither entries")
}

// TestBootEntry chooses what boots, and replaces its command line.
func TestBootEntry(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	image := bootImage(t, demoSystem(1))
	p := h.start("run", "e", "--memory", "64M", "--disk", image, "--boot-entry", "Other")
	p.out.awaitText(t, 0, "owns 40M")
	p.kill(syscall.SIGKILL)
	p.wait()
	p = h.start("run", "e", "--memory", "64M", "--disk", image, "--boot-entry", "other", "--cmdline", "fill=7M tick=0.5")
	p.out.awaitText(t, 0, "owns 7M")
	if out := h.must("info", "e"); !strings.Contains(out, "Other (") {
		t.Errorf("info says %s", out)
	}
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"--disk", image + "x", "--boot-entry", "other"}, "no such file"},
		{[]string{"--boot-entry", "other"}, "--boot-entry needs --disk, and no --kernel"},
		{[]string{"--disk", image, "--kernel", "/dev/null", "--boot-entry", "other"}, "--boot-entry needs --disk, and no --kernel"},
		{[]string{"--disk", newImage(t, mib), "--boot-entry", "other"}, "rust-hypervisor-firmware"},
	} {
		_, stderr, exit := h.run(append([]string{"run", "f", "--memory", "64M"}, c.args...)...)
		if exit == 0 || !strings.Contains(stderr, c.says) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: exit %d, expected %q, found %q", c.args, exit, c.says, stderr)
		}
	}
}

// TestImageBoots: govmm image info lists what boots, and a VM boots from a qcow2 image that stays
// as it is, and again at its reset.
func TestImageBoots(t *testing.T) {
	needKVM(t)
	testenv.NeedTools(t, "qemu-img")
	h := newHost(t)
	qcow2 := filepath.Join(t.TempDir(), "a.qcow2")
	tool(t, "qemu-img", "convert", "-c", "-O", "qcow2", bootImage(t, demoSystem(3)), qcow2)
	for _, want := range []string{"boots   \"simple\", Debian GNU/Linux, /boot/vmlinuz-6.1.0-28-cloud-amd64, with fill=3M tick=0.5 console=ttyS0\n", "        \"other\", Other, /boot/"} {
		if out := h.must("image", "info", qcow2); !strings.Contains(out, want) {
			t.Errorf("expected %q in %s", want, out)
		}
	}
	if out := h.must("image", "info", qcow2, "--json"); !strings.Contains(out, `"boot":[{"id":"simple","title":"Debian GNU/Linux"`) {
		t.Errorf("found %s", out)
	}
	p := h.start("run", "i", "--memory", "64M", "--disk", "path="+qcow2+",ephemeral")
	p.out.awaitText(t, 0, "owns 3M")
	p.out.awaitTick(t, 0, "any", func(tick) bool { return true })
	at := p.out.len()
	p.typeLine("reboot")
	p.out.awaitText(t, at, "owns 3M")
}

// TestDiskReaderEnds: the process that reads the disk has no files, no capabilities and a filter,
// and ends with the VM, however that ends.
func TestDiskReaderEnds(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	p := h.start("run", "r", "--memory", "64M", "--disk", bootImage(t, demoSystem(1)))
	p.out.awaitTick(t, 0, "any", func(tick) bool { return true })
	out, err := exec.Command("pgrep", "-P", fmt.Sprint(p.cmd.Process.Pid), "-f", "__read-disk").Output()
	testenv.Check(t, err)
	dir := "/proc/" + strings.TrimSpace(string(out))
	status, err := os.ReadFile(dir + "/status")
	testenv.Check(t, err)
	for _, want := range []string{"\nSeccomp:\t2\n", "\nNoNewPrivs:\t1\n", "\nCapEff:\t0000000000000000\n", "\nCapPrm:\t0000000000000000\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("expected %q in %s", want, status)
		}
	}
	fds, err := os.ReadDir(dir + "/fd")
	testenv.Check(t, err)
	for _, fd := range fds {
		if to, err := os.Readlink(dir + "/fd/" + fd.Name()); err == nil && to != "/dev/null" && !strings.HasPrefix(to, "socket:") && !strings.HasPrefix(to, "anon_inode:") &&
			!strings.HasPrefix(to, "/sys/fs/cgroup/") { // Go's runtime has these
			t.Errorf("the reader has %s open", to)
		}
	}
	p.kill(syscall.SIGKILL)
	p.wait()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(dir); err != nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the reader goes on without its VM")
		}
	}
}
