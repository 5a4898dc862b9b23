package test

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/vmm/loader/elftest"
)

// typeLine types a line at the guest's serial console.
func (p *proc) typeLine(s string) {
	p.t.Helper()
	if _, err := io.WriteString(p.in, s+"\r"); err != nil {
		p.t.Fatal(err)
	}
}

// TestPowerOff: run without a kernel boots the demo guest. It takes what is typed, and
// its power-off ends govmm with status 0.
func TestPowerOff(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	p := h.start("run")
	p.out.awaitTick(t, 0, "any", func(tick) bool { return true })
	if i := h.info("vm"); i.Name != "vm" || i.State != "running" || i.PID != p.cmd.Process.Pid {
		t.Errorf("%+v", i)
	}
	p.typeLine("help")
	p.out.awaitText(t, 0, "poweroff")
	p.typeLine("poweroff")
	if p.wait() != 0 {
		t.Errorf("poweroff: exit %d", p.exit)
	}
}

// TestReboot: after a reboot the guest runs in the same process with the same name.
func TestReboot(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	p := h.start("run", "r", "--cpus", "2", "--memory", "64M", "--cmdline", "fill=16M dirty=4M rate=100 verify=1 tick=1")
	p.out.awaitTick(t, 0, "2", func(k tick) bool { return k.n == 2 })
	p.typeLine("reboot")
	at := p.out.len()
	p.out.awaitTick(t, at, "1 again", func(k tick) bool { return k.n == 1 })
	if i := h.info("r"); i.PID != p.cmd.Process.Pid || i.State != "running" {
		t.Errorf("%+v", i)
	}

	// Also at the destination, which does not have the kernel's file.
	there, addr := h.receive("s")
	if r, exit := h.migrate("r", "--to", addr); exit != 0 {
		t.Fatalf("%+v", r)
	}
	awaitVerified(t, there.out, 0, 16*mib/mempage.Size)
	there.typeLine("reboot")
	at = there.out.len()
	there.out.awaitTick(t, at, "1 again", func(k tick) bool { return k.n == 1 })
	there.typeLine("poweroff")
	if there.wait() != 0 {
		t.Errorf("poweroff at the destination: exit %d", there.exit)
	}
}

// TestTripleFaultResets: a triple fault resets the guest, as it does a PC, and is
// logged with its place.
func TestTripleFaultResets(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	p := h.start("run", "--memory", "64M", "--cmdline", "tick=1")
	p.mayFault = true
	p.out.awaitTick(t, 0, "any", func(tick) bool { return true })
	p.typeLine("crash")
	p.out.awaitTick(t, p.out.len(), "1 again", func(k tick) bool { return k.n == 1 })
	p.typeLine("poweroff")
	if p.wait() != 0 {
		t.Errorf("poweroff: exit %d", p.exit)
	}
	if all := p.err.tail(20); !strings.Contains(all, "triple fault") {
		t.Errorf("it says %q", all)
	}
}

// TestInternalErrorIsExplained: an internal error of KVM is explained, with the
// reason, RIP, the instruction's bytes if there are any, and what it means. No KVM
// executes where there is no memory; one without hardware virtualisation does not know
// FWAIT in ring 0.
func TestInternalErrorIsExplained(t *testing.T) {
	needKVM(t)
	cases := map[string]struct {
		code  []byte
		wants []string
	}{
		"no memory": {[]byte{0xb8, 0x00, 0x00, 0x00, 0xd0, 0xff, 0xe0}, // mov eax, 0xd0000000; jmp eax
			[]string{"KVM_EXIT_INTERNAL_ERROR", "RIP 0xd0000000"}},
	}
	if !hasHardwareKVM(t) {
		cases["fwait"] = struct {
			code  []byte
			wants []string
		}{[]byte{0x9b, 0xf4}, []string{"KVM_EXIT_INTERNAL_ERROR", "emulation failure", "RIP 0x100000", "9b f4", "FWAIT"}}
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			p := newHost(t).start("run", "--kernel", writeKernel(t, c.code), "--memory", "64M")
			if p.wait() != 1 {
				t.Errorf("exit %d", p.exit)
			}
			for _, want := range c.wants {
				if all := p.err.tail(20); !strings.Contains(all, want) {
					t.Errorf("it does not say %q: %s", want, all)
				}
			}
		})
	}
}

func hasHardwareKVM(t *testing.T) bool {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`(?m)^flags\s*:.*\b(vmx|svm)\b`).Match(b)
}

// writeKernel makes a PVH ELF of 32-bit code.
func writeKernel(t *testing.T, code []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kernel.elf")
	if err := os.WriteFile(path, elftest.Build(elftest.Kernel{Code: code}), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestForeignGuest: a kernel that is not ours boots from its PVH note, counts on the
// serial port, and goes on counting at the destination.
func TestForeignGuest(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	// Prints the letters a to z and a newline for ever. It waits for the transmitter, and
	// keeps its place in memory.
	code := []byte{
		0xbf, 0x00, 0x00, 0x30, 0x00, // mov edi, 0x300000
		0xc6, 0x07, 0x61, // again: mov byte [edi], 'a'
		0x66, 0xba, 0xfd, 0x03, // next: mov dx, 0x3fd
		0xec,       // wait: in al, dx
		0xa8, 0x20, // test al, 0x20
		0x74, 0xfb, // jz wait
		0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0x8a, 0x07, // mov al, [edi]
		0x3c, 0x7b, // cmp al, 'z'+1
		0x74, 0x05, // je line
		0xee,       // out dx, al
		0xfe, 0x07, // inc byte [edi]
		0xeb, 0xe8, // jmp next
		0xb0, 0x0a, // line: mov al, '\n'
		0xee,       // out dx, al
		0xeb, 0xe0, // jmp again
	}
	src := h.start("run", "src", "--kernel", writeKernel(t, code), "--memory", "64M")
	const alphabet = "abcdefghijklmnopqrstuvwxyz"
	src.out.await(t, 3, alphabet, func(s string) bool { return s == alphabet })
	there, addr := h.receive("dst")
	r, exit := h.migrate("src", "--to", addr, "--verify-pages")
	if exit != 0 {
		t.Fatalf("%+v", r)
	}
	there.out.await(t, 5, alphabet, func(s string) bool { return s == alphabet })
	src.wait()
	// No letter is lost or printed twice. The move may cut a line: a line that a slow
	// guest does not go on with for 20 ms is printed before its end.
	before, after := src.out.snapshot(), there.out.snapshot()
	if n := len(before) - 1; before[n] != alphabet {
		after[0] = before[n] + after[0]
		before = before[:n]
	}
	for _, s := range append(before, after...) {
		if s != alphabet {
			t.Errorf("a line is %q", s)
		}
	}
}

// TestNames: the default name, the next free one, one that is taken, one that does not
// run, and none where several run.
func TestNames(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	small := []string{"--memory", "32M", "--cmdline", "tick=1"}
	a := h.start(append([]string{"run"}, small...)...)
	a.out.awaitTick(t, 0, "any", func(tick) bool { return true })
	b := h.start(append([]string{"run"}, small...)...)
	b.out.awaitTick(t, 0, "any", func(tick) bool { return true })
	c, _ := h.receive("c")
	out := h.must("ps")
	if !regexp.MustCompile(`(?m)^NAME\s+STATE\s+CPUS\s+MEMORY\s+PID`).MatchString(out) {
		t.Errorf("ps printed\n%s", out)
	}
	for name, p := range map[string]*proc{"vm": a, "vm2": b, "c": c} {
		if !regexp.MustCompile(fmt.Sprintf(`(?m)^%s\s.*\b%d\b`, name, p.cmd.Process.Pid)).MatchString(out) {
			t.Errorf("ps does not show %s with pid %d:\n%s", name, p.cmd.Process.Pid, out)
		}
	}
	var list []info
	if err := json.Unmarshal([]byte(h.must("ps", "--json")), &list); err != nil || len(list) != 3 {
		t.Errorf("ps --json: %v, %+v", err, list)
	}
	oneLine := func(want string, args ...string) {
		t.Helper()
		_, errs, exit := h.run(args...)
		if exit != 1 || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, want) {
			t.Errorf("%v: exit %d, %q", args, exit, errs)
		}
	}
	oneLine("vm", append([]string{"run", "vm"}, small...)...)
	oneLine("nobody", "info", "nobody")
	oneLine("vm2", "pause")
	// A killed VM leaves a stale socket, which must not count as a VM.
	b.kill(syscall.SIGKILL)
	b.wait()
	if out := h.must("ps"); strings.Contains(out, "vm2") {
		t.Errorf("ps shows a dead VM:\n%s", out)
	}
	again := h.start(append([]string{"run", "vm2"}, small...)...)
	again.out.awaitTick(t, 0, "any", func(tick) bool { return true })
	h.must("stop", "--force", "vm")
	h.must("stop", "--force", "vm2")
	h.must("stop", "--force", "c")
	for _, p := range []*proc{a, again, c} {
		if p.wait() != 0 {
			t.Errorf("stopped: exit %d", p.exit)
		}
	}
	if out := h.must("ps", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("ps --json with nothing: %q", out)
	}
}

// TestRefusalListsReasons: a destination refuses before a byte of memory is sent, and
// says why.
func TestRefusalListsReasons(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	src := h.startDemo("src", 1, 128, 32, 4)
	_, addr := h.receive("dst")
	there, addr2 := h.receive("dst2")
	if r, exit := h.migrate("src", "--to", addr); exit != 0 {
		t.Fatalf("%+v", r)
	}
	src.wait()
	// dst already has a guest.
	h.startDemo("other", 1, 128, 32, 4)
	r, exit := h.migrate("other", "--to", addr)
	if exit < 3 || r.Status != "failed" || !strings.Contains(r.Error, "arrived here already") || len(r.Rounds) != 0 {
		t.Errorf("exit %d, %+v", exit, r)
	}
	if r, exit := h.migrate("other", "--to", addr2); exit != 0 {
		t.Fatalf("%+v", r)
	}
	awaitVerified(t, there.out, 0, 32*mib/mempage.Size)
}

// The two kernels listen to the power button (PM1a_EN at port 0x602): one powers off when it is
// pressed (PM1a_STS at 0x600, PM1a_CNT at 0x604), one does nothing.
var (
	enables = []byte{0x66, 0xba, 0x02, 0x06, 0x66, 0xb8, 0x00, 0x01, 0x66, 0xef} // mov $0x602,%dx; mov $0x100,%ax; out %ax,%dx
	obeys   = append(append([]byte{}, enables...),
		0x66, 0xba, 0x00, 0x06, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf5, // 1: mov $0x600,%dx; in %dx,%ax; test $1,%ah; jz 1b
		0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x20, 0x66, 0xef, // mov $0x604,%dx; mov $0x2000,%ax; out %ax,%dx
		0xfa, 0xf4) // cli; hlt
	ignores = append(append([]byte{}, enables...), 0xfa, 0xf4) // cli; hlt
)

// TestPowerButton: stop waits until a guest has powered off by its button; when its time has
// passed it fails and the guest goes on, or ends with --then-force.
func TestPowerButton(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	start := func(code []byte) *proc {
		t.Helper()
		kernel := filepath.Join(t.TempDir(), "kernel")
		testenv.Check(t, os.WriteFile(kernel, vmtest.Kernel(code), 0o644))
		p := h.start("run", "a", "--memory", "16M", "--serial", "null", "--kernel", kernel)
		p.err.awaitText(t, 0, "a runs")
		return p
	}
	// stop is tried until the guest listens.
	stop := func(args ...string) (stdout, stderr string, exit int) {
		t.Helper()
		for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
			stdout, stderr, exit = h.run(append([]string{"stop", "a"}, args...)...)
			if !strings.Contains(stderr, "does not listen to its power button") || time.Now().After(deadline) {
				return stdout, stderr, exit
			}
		}
	}
	p := start(obeys)
	if stdout, stderr, exit := stop(); exit != 0 || stdout != "" || stderr != "govmm: a is stopped\n" {
		t.Errorf("exit %d, %q, %q", exit, stdout, stderr)
	}
	if exit := p.wait(); exit != 0 || !strings.Contains(p.err.tail(5), "a: the guest powered off") {
		t.Errorf("exit %d, %q", exit, p.err.tail(5))
	}
	p = start(ignores)
	const late = "the guest has not powered off within 300ms; it was asked to, and may still do so; "
	if stdout, stderr, exit := stop("--timeout", "300ms"); exit != 1 || stdout != "" || stderr != "govmm: stop a: "+late+"--force ends it at once\n" {
		t.Errorf("exit %d, %q, %q", exit, stdout, stderr)
	}
	if i := h.info("a"); i.State != "running" {
		t.Errorf("%+v", i)
	}
	if stdout, stderr, exit := stop("--timeout", "300ms", "--then-force"); exit != 0 || stdout != "" ||
		stderr != "govmm: stop a: "+strings.TrimSuffix(late, "; ")+"; it is ended now\ngovmm: a is stopped\n" {
		t.Errorf("exit %d, %q, %q", exit, stdout, stderr)
	}
	if exit := p.wait(); exit != 0 {
		t.Errorf("exit %d", exit)
	}
}
