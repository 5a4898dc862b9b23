package test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/image"
	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/test/kernel"
	"github.com/govmm/govmm/vmm/diskboot"
)

// debianTree is a directory with a Debian system: with GOVMM_ACCEPT all of it, otherwise its
// kernel, an initial RAM disk and the grub.cfg that grub-mkconfig has written (testdata). It
// returns the kernel's and the initial RAM disk's paths, and their version.
func debianTree(t *testing.T) (dir, vmlinuz, initrd, version string) {
	t.Helper()
	if testenv.Full() {
		testenv.NeedRoot(t, "for debootstrap")
		dir, err := kernel.DebianSystem()
		testenv.Check(t, err)
		found, err := filepath.Glob(filepath.Join(dir, "boot/vmlinuz-*"))
		testenv.Check(t, err)
		if len(found) != 1 {
			t.Fatalf("%s has %d kernels", dir, len(found))
		}
		version = strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-")
		return dir, found[0], filepath.Join(dir, "boot/initrd.img-"+version), version
	}
	bzImage, archive := debianFiles(t)
	config, err := os.ReadFile("testdata/debian12-grub.cfg")
	testenv.Check(t, err)
	dir, version = t.TempDir(), "6.1.0-50-cloud-amd64"
	for _, d := range []string{"boot/grub", "etc", "usr/bin"} {
		testenv.Check(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	vmlinuz, initrd = filepath.Join(dir, "boot/vmlinuz-"+version), filepath.Join(dir, "boot/initrd.img-"+version)
	tool(t, "cp", bzImage, vmlinuz)
	tool(t, "cp", archive, initrd)
	testenv.Check(t, os.WriteFile(filepath.Join(dir, "boot/grub/grub.cfg"), bytes.ReplaceAll(config, []byte("VERSION"), []byte(version)), 0o644))
	return dir, vmlinuz, initrd, version
}

func tool(t testing.TB, name string, args ...string) {
	t.Helper()
	testenv.NeedTools(t, name)
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// TestDebianImage: in an image that is made of Debian's packages, compressed qcow2 as its
// cloud images are, what would boot is found by the process that finds it for a VM, and is
// byte by byte what was put in.
func TestDebianImage(t *testing.T) {
	testenv.NeedTools(t, "mke2fs", "mkfs.vfat", "sfdisk", "qemu-img")
	dir, vmlinuz, initrd, version := debianTree(t)
	qcow2, size := filepath.Join(t.TempDir(), "debian.qcow2"), 256
	if testenv.Full() {
		size = 2048
	}
	testenv.Check(t, kernel.CloudImage(dir, size, qcow2))
	im, err := image.Open(qcow2, image.QCOW2)
	testenv.Check(t, err)
	defer im.Close()
	r, err := diskboot.Start([]string{govmm, "__read-disk"})
	testenv.Check(t, err)
	defer r.Close()
	found, err := r.Read(context.Background(), im, "")
	testenv.Check(t, err)
	for _, f := range []struct {
		path string
		got  []byte
	}{{vmlinuz, found.Kernel}, {initrd, found.Initrd}} {
		want, err := os.ReadFile(f.path)
		testenv.Check(t, err)
		if !bytes.Equal(f.got, want) {
			t.Errorf("%s: found %d bytes, and not the %d that were put in", f.path, len(f.got), len(want))
		}
	}
	e := found.Entry
	const rest = " ro console=tty0 console=ttyS0,115200 earlyprintk=ttyS0,115200 consoleblank=0"
	if e.Cmdline != "root=/dev/vda1"+rest && e.Cmdline != "root=UUID="+kernel.SystemRoot+rest {
		t.Errorf("the command line is %q", e.Cmdline)
	}
	if e.Title != "Debian GNU/Linux" || e.ID != "gnulinux-simple-"+kernel.SystemRoot || e.Kernel != "/boot/vmlinuz-"+version {
		t.Errorf("found %+v", e)
	}
	list, err := r.List(context.Background(), im)
	if err != nil || len(list) != 3 {
		t.Errorf("expected 3 entries, found %d: %v", len(list), err)
	}
	for _, e := range list {
		t.Logf("%s: %s", e.ID, e.Title)
	}
}

// TestDebianFromDisk: Debian's kernel boots from a disk, and with another command line after
// the guest's reboot.
func TestDebianFromDisk(t *testing.T) {
	needSVM(t)
	bzImage, initrd := debianFiles(t)
	system := func(word string) map[string]string {
		files := map[string]string{"etc/x": "", "usr/x": ""}
		for name, path := range map[string]string{"vmlinuz-6.1": bzImage, "initrd.img-6.1": initrd} {
			b, err := os.ReadFile(path)
			testenv.Check(t, err)
			files["boot/"+name] = string(b)
		}
		files["boot/grub/grub.cfg"] = "menuentry Debian {\nlinux /boot/vmlinuz-6.1 " + debianCmdline() + " " + word + "\ninitrd /boot/initrd.img-6.1\n}\n"
		return files
	}
	h := newHost(t)
	disk := bootImage(t, system("first=1"))
	vm := &shell{proc: h.start("run", "fd0", "--memory", "256M", "--disk", disk)}
	at := vm.awaitLong(0, "init: ready")
	if got := vm.does("cat /proc/cmdline"); !strings.Contains(got, "first=1") {
		t.Errorf("the command line is %q", got)
	}
	install(t, disk, system("second=2"))
	_, err := fmt.Fprintln(vm.in, "reboot -f")
	testenv.Check(t, err)
	vm.awaitLong(at+1, "init: ready")
	if got := vm.does("cat /proc/cmdline"); !strings.Contains(got, "second=2") {
		t.Errorf("the command line is %q", got)
	}
}
