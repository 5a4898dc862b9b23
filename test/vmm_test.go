package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/guest"
)

// idleGuest owns no memory and says nothing after its first lines.
const idleGuest = "tick=0"

// idleMemory is the memory of the guests here. The one mapping of that length is the
// guest's memory.
const idleMemory = 200 * mib

// residence is how much of a process is in memory (Rss of proc_pid_smaps(5)), in bytes:
// of the guest's memory, and of all else.
func residence(t testing.TB, pid int) (ram, beyond uint64) {
	t.Helper()
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	found, inside := 0, false
	for line := range strings.Lines(string(smaps)) {
		var start, end, kib uint64
		if _, err := fmt.Sscanf(line, "%x-%x ", &start, &end); err == nil {
			if inside = end-start == idleMemory; inside {
				found++
			}
		} else if value, ok := strings.CutPrefix(line, "Rss:"); ok {
			if _, err := fmt.Sscan(value, &kib); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			if inside {
				ram += kib << 10
			} else {
				beyond += kib << 10
			}
		}
	}
	if found != 1 {
		t.Fatalf("%d mappings are as long as the guest's memory, not 1:\n%s", found, smaps)
	}
	return ram, beyond
}

// cpuTime is the processor time of a process with its vCPUs (utime and stime of
// proc_pid_stat(5)).
func cpuTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(stat), ") ") // the name may have spaces
	fields := strings.Fields(after)
	if len(fields) < 13 {
		t.Fatalf("/proc/%d/stat: %q", pid, stat)
	}
	var ticks time.Duration
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			t.Fatalf("/proc/%d/stat: %q", pid, stat)
		}
		ticks += time.Duration(n)
	}
	return ticks * (time.Second / 100) // USER_HZ is 100 on x86
}

// idle starts govmm with an idle guest.
func (h *host) idle(name string, args ...string) *proc {
	h.t.Helper()
	vm := h.start(append([]string{"run", name, "--cpus", "1", "--memory", fmt.Sprintf("%dM", idleMemory/mib), "--cmdline", idleGuest}, args...)...)
	vm.out.awaitText(h.t, 0, "owns ")
	return vm
}

// TestSizeOfTheVMM: a VMM with an idle guest uses less than 20 MiB beyond the memory
// that the guest has touched, also with devices (docs/SPECIFICATION.md).
func TestSizeOfTheVMM(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	image := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(image, make([]byte, 16*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"bare":    nil,
		"devices": {"--disk", "path=" + image, "--console", "null", "--vsock", "path=" + filepath.Join(h.dir, "v")},
	} {
		vm := h.idle(name, args...)
		ram, beyond := residence(t, vm.cmd.Process.Pid)
		t.Logf("%s: %.1f MiB of the guest's memory, %.1f MiB beyond", name, float64(ram)/mib, float64(beyond)/mib)
		if ram == 0 || ram > idleMemory/2 {
			t.Errorf("%s: %d bytes of the guest's memory are there", name, ram)
		}
		if beyond > 20*mib {
			t.Errorf("%s: %d bytes beyond the guest's memory", name, beyond)
		}
	}
}

// switches is the number of context switches of the threads of a process
// (proc_pid_status(5)).
func switches(t testing.TB, pid int) (n uint64) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("threads of %d: %d, %v", pid, len(files), err)
	}
	for _, f := range files {
		status, err := os.ReadFile(f)
		if err != nil {
			continue // the thread has ended
		}
		for line := range strings.Lines(string(status)) {
			name, value, _ := strings.Cut(line, ":")
			if name == "voluntary_ctxt_switches" || name == "nonvoluntary_ctxt_switches" {
				v, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
				if err != nil {
					t.Fatalf("%s: %q", f, line)
				}
				n += v
			}
		}
	}
	return n
}

// TestIdleVMMSleeps: nothing in the VMM of an idle guest polls. The demo guest
// wakes four times a second by itself. Start-up and a busy host add context
// switches, so the test waits for a second with few of them; with a thread that
// polls there is none. BenchmarkIdle measures the share of a processor.
func TestIdleVMMSleeps(t *testing.T) {
	needKVM(t)
	vm := newHost(t).idle("idle")
	before := switches(t, vm.cmd.Process.Pid)
	for deadline := time.Now().Add(patience); ; {
		time.Sleep(time.Second)
		now := switches(t, vm.cmd.Process.Pid)
		n := now - before
		before = now
		t.Logf("%d context switches in a second", n)
		if n <= 200 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d context switches in a second, and never fewer than 200", n)
		}
	}
}

// startMicroVM starts the demo guest in QEMU's machine for small guests, for comparison
// of start-up and size.
func startMicroVM(b *testing.B, elf string) (cmd *exec.Cmd, out *lines, end func()) {
	b.Helper()
	const bios = "/usr/share/qemu/qboot.rom"
	if _, err := os.Stat(bios); err != nil {
		b.Skipf("NO QEMU HERE, NOT COMPARED: %v", err)
	}
	cmd = exec.Command("qemu-system-x86_64", "-accel", "kvm", "-cpu", "host,-arch-capabilities", "-M", "microvm,acpi=off", "-bios", bios,
		"-m", fmt.Sprintf("%dM", idleMemory/mib), "-smp", "1", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", elf, "-append", idleGuest)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Skipf("NO QEMU HERE, NOT COMPARED: %v", err)
	}
	out = newLines()
	read := make(chan struct{})
	go func() {
		out.from(stdout)
		close(read)
	}()
	return cmd, out, func() {
		_ = cmd.Process.Kill()
		<-read
		_ = cmd.Wait() // killed
	}
}

func demoELF(b *testing.B) string {
	b.Helper()
	elf := filepath.Join(b.TempDir(), "demo.elf")
	if err := os.WriteFile(elf, guest.ELF, 0o600); err != nil {
		b.Fatal(err)
	}
	return elf
}

// BenchmarkStart is the time from the start of a process to the demo guest's
// first line, of govmm and of QEMU's microvm in turn.
func BenchmarkStart(b *testing.B) {
	needKVM(b)
	h, elf, t, n := newHost(b), demoELF(b), newTurns(b), 0
	for b.Loop() {
		n++
		began := time.Now()
		vm := h.start("run", fmt.Sprintf("start%d", n), "--memory", fmt.Sprintf("%dM", idleMemory/mib), "--cmdline", idleGuest)
		vm.out.awaitText(b, 0, "govmm demo guest")
		t.add("govmm", time.Since(began))
		vm.kill(syscall.SIGKILL)
		vm.wait()

		began = time.Now()
		_, out, end := startMicroVM(b, elf)
		out.awaitText(b, 0, "govmm demo guest")
		t.add("microvm", time.Since(began))
		end()
	}
	b.ReportMetric(0, "ns/op")
	ours, theirs := median(t.took["govmm"])*1000, median(t.took["microvm"])*1000
	b.ReportMetric(ours, "ms")
	b.ReportMetric(theirs, "microvm-ms")
	t.ratio("govmm", "microvm", "of-microvm")
	if ours > theirs || !emulated() && ours > 30 {
		b.Errorf("%.1f ms to the guest's first line, QEMU's microvm %.1f: promised are 30, and less than that", ours, theirs)
	}
}

// BenchmarkIdle is the cost of an idle VM, memory beyond the guest's and share of a
// processor, beside QEMU's microvm with the same guest.
func BenchmarkIdle(b *testing.B) {
	needKVM(b)
	h := newHost(b)
	vm := h.idle("idle")
	cmd, out, end := startMicroVM(b, demoELF(b))
	defer end()
	out.awaitText(b, 0, "owns ")
	const d = 5 * time.Second
	time.Sleep(time.Second) // what start-up leaves behind
	pids := map[string]int{"": vm.cmd.Process.Pid, "microvm-": cmd.Process.Pid}
	shares := map[string][]float64{}
	for b.Loop() {
		before := map[string]time.Duration{}
		for name, pid := range pids {
			before[name] = cpuTime(b, pid)
		}
		time.Sleep(d)
		for name, pid := range pids {
			shares[name] = append(shares[name], 100*float64(cpuTime(b, pid)-before[name])/float64(d))
		}
	}
	b.ReportMetric(0, "ns/op")
	for name, pid := range pids {
		_, beyond := residence(b, pid)
		b.ReportMetric(float64(beyond)/mib, name+"MiB-beyond-RAM")
		b.ReportMetric(median(shares[name]), name+"%-of-a-core")
	}
	if share := median(shares[""]); !emulated() && share > 1 {
		b.Errorf("an idle VM takes %.2f%% of a core: promised is 1", share)
	}
}
