package test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/test/kernel"
)

// needSVM skips the test where KVM emulates ring 0: its emulator lacks
// instructions that Debian's kernel uses.
func needSVM(t testing.TB) {
	t.Helper()
	testenv.NeedVirtualisation(t, "Debian's kernel as it is")
}

// debianInit is the guest's first process: a shell on the serial port. acpid turns the
// power button into poweroff.
const debianInit = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin PS1='$ '
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for m in /modules/*.ko; do insmod $m || echo "init: BAD MODULE $m"; done
mkdir -p /var/run /var/log
acpid
echo init: ready
while :; do setsid cttyhack sh; done
`

// debianCmdline is the command line of Debian's kernel. On an emulated SVM, KVM does not
// learn that the guest has enabled AVX, so the kernel does not expect the sizes that
// CPUID gives. It runs without XSAVE there (docs/testing.md).
func debianCmdline() string {
	const cmdline = "console=ttyS0 panic=-1"
	if emulated() {
		return cmdline + " noxsave"
	}
	return cmdline
}

// debianFiles are Debian's cloud kernel and an initial RAM disk with busybox, the
// kernel's drivers, and more files.
func debianFiles(t testing.TB, more ...kernel.File) (bzImage, initrd string) {
	t.Helper()
	bzImage, files, err := kernel.CloudGuest()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"proc", "sys", "etc", "etc/acpi", "etc/acpi/PWRF"} {
		files = append(files, kernel.File{Name: d, Mode: 0o040755})
	}
	files = append(append(files, more...),
		kernel.File{Name: "init", Data: []byte(debianInit)},
		// busybox's acpid names the button's event so.
		kernel.File{Name: "etc/acpi/PWRF/00000080", Data: []byte("#!/bin/sh\necho the button >/dev/ttyS0\n/bin/busybox poweroff -f\n")})
	initrd = filepath.Join(t.TempDir(), "initrd.img")
	if err := os.WriteFile(initrd, kernel.Initramfs(files...), 0o600); err != nil {
		t.Fatal(err)
	}
	return bzImage, initrd
}

// shell is a guest's shell on its serial port.
type shell struct {
	*proc
	n int // commands so far
}

// does runs a command in the guest and returns what it printed. The shell composes the
// line that marks the end, so the echo of the command is not taken for it.
func (s *shell) does(command string) string {
	s.t.Helper()
	s.n++
	from := s.out.len()
	if _, err := fmt.Fprintf(s.in, "%s; echo \"en\"d-%d\n", command, s.n); err != nil {
		s.t.Fatal(err)
	}
	end := s.awaitLong(from, fmt.Sprintf("end-%d", s.n))
	var out []string
	for _, line := range s.out.snapshot()[from:end] {
		if !strings.Contains(line, "echo \"en\"d-") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "\n")
}

// awaitLong is awaitText with the patience that a boot needs.
func (p *proc) awaitLong(from int, text string) (at int) {
	p.t.Helper()
	for deadline := time.Now().Add(bootPatience); ; time.Sleep(50 * time.Millisecond) {
		for i, s := range p.out.snapshot()[from:] {
			if strings.Contains(s, text) {
				return from + i
			}
		}
		select {
		case <-p.done:
			p.t.Fatalf("the guest has ended without %q", text)
		default:
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("no %q within %v", text, bootPatience)
		}
	}
}

// TestDebianKernel: Debian's cloud kernel, unmodified, boots to a shell on the serial
// port and sees its disk, its network card and its memory. After a move it goes on with
// what it was doing. It ends by its own poweroff, and by the power button.
func TestDebianKernel(t *testing.T) {
	needSVM(t)
	bzImage, initrd := debianFiles(t)
	for _, end := range []string{"button", "poweroff"} {
		t.Run(end, func(t *testing.T) {
			h := newHost(t)
			disk := "path=" + content(t, 8*mib)
			args := []string{"run", "at0", "--cpus", "2", "--memory", "256M", "--kernel", bzImage, "--initrd", initrd,
				"--cmdline", debianCmdline(), "--disk", disk}
			var net []string
			if os.Geteuid() == 0 {
				net = []string{"--net", "tap"}
			}
			vm := &shell{proc: h.start(append(args, net...)...)}
			vm.awaitLong(0, "init: ready")
			if got := vm.does("echo $((6*7))"); !strings.Contains(got, "42") {
				t.Fatalf("6*7 is %q", got)
			}
			vm.sees(len(net) > 0)
			vm.does("word=kept; dd if=/dev/urandom of=/file bs=1M count=16 2>/dev/null; md5sum /file >/sum")
			vm.does("(while :; do md5sum -c /sum >/dev/null || echo BAD >/dev/ttyS0; done) & true")
			next, addr := h.receive("at1", append(net, "--disk", disk)...)
			got, exit := h.migrate("at0", "--to", addr, "--downtime-limit", "3s")
			if exit != 0 || got.Status != "completed" {
				t.Fatalf("exit %d, %+v", exit, got)
			}
			vm.wait()
			vm.quietly(0)
			vm.proc = next
			if got := vm.does("echo $word; md5sum -c /sum"); !strings.Contains(got, "kept") || !strings.Contains(got, "/file: OK") {
				t.Errorf("after it has moved: %q", got)
			}
			vm.sees(len(net) > 0)
			if end == "button" {
				h.must("stop", "at1")
				vm.awaitLong(0, "the button")
			} else if _, err := vm.in.Write([]byte("poweroff -f\n")); err != nil {
				t.Fatal(err)
			}
			vm.err.awaitText(t, 0, "powered off")
			if exit := vm.wait(); exit != 0 {
				t.Errorf("exit %d", exit)
			}
			vm.quietly(0)
			if strings.Contains(strings.Join(vm.out.snapshot(), "\n"), "BAD") {
				t.Error("a file has changed")
			}
		})
	}
}

// sees checks the guest's disk, memory, vCPUs and network card.
func (s *shell) sees(net bool) {
	s.t.Helper()
	if got := s.does("ls -l /dev/vda"); !strings.Contains(got, "brw") {
		s.t.Errorf("/dev/vda: %q", got)
	}
	if got := s.does("echo 1 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=16 skip=100 count=1 2>/dev/null; echo"); !strings.Contains(got, "govmm-disk-block") {
		s.t.Errorf("the disk has %q", got)
	}
	if got := s.does("head -1 /proc/meminfo; nproc"); !regexp.MustCompile(`MemTotal: +2\d{5} kB`).MatchString(got) || !strings.Contains(got, "\n2") {
		s.t.Errorf("/proc/meminfo and nproc: %q", got)
	}
	if got := s.does("ip link show eth0"); net && !strings.Contains(got, "eth0") {
		s.t.Errorf("eth0: %q", got)
	}
}
