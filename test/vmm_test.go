package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// idleGuest owns no memory and says nothing after its first lines.
const idleGuest = "tick=0"

// idleMemory is the memory of the guests here. The one mapping of that length is the
// guest's memory.
const idleMemory = 200 * mib

// residence is how much of a process is in memory (proc_pid_smaps(5)), in bytes: of the
// guest's memory, of all else (Rss), and of that what is the process's own (Anonymous).
func residence(t testing.TB, pid int) (ram, beyond, private uint64) {
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
		} else if value, ok := strings.CutPrefix(line, "Anonymous:"); ok && !inside {
			if _, err := fmt.Sscan(value, &kib); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			private += kib << 10
		}
	}
	if found != 1 {
		t.Fatalf("%d mappings are as long as the guest's memory, not 1:\n%s", found, smaps)
	}
	return ram, beyond, private
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

// TestSizeOfTheVMM: a VMM with an idle guest uses, once it has settled, less than 10 MiB
// beyond the memory that the guest has touched, also with devices (docs/SPECIFICATION.md).
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
		ram, beyond, _ := residence(t, vm.cmd.Process.Pid)
		for deadline := time.Now().Add(patience); beyond > 10*mib && time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
			ram, beyond, _ = residence(t, vm.cmd.Process.Pid)
		}
		t.Logf("%s: %.1f MiB of the guest's memory, %.1f MiB beyond", name, float64(ram)/mib, float64(beyond)/mib)
		if ram == 0 || ram > idleMemory/2 {
			t.Errorf("%s: %d bytes of the guest's memory are there", name, ram)
		}
		if beyond > 10*mib {
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
// wakes once a second by itself. Start-up and a busy host add context
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

// BenchmarkStart is the time from the start of a process to the demo guest's first byte
// on the serial port, of govmm and its peers in turn, with the processor time until then.
func BenchmarkStart(b *testing.B) {
	c := compare(b)
	for b.Loop() {
		for _, p := range c.peers {
			cmd := p.command(idleMemory/mib, idleGuest)
			took, end := firstByte(b, cmd)
			end()
			c.add(p, "ms", float64(took.Microseconds())/1000)
		}
	}
	c.report("ms")
	ours, _ := c.of("govmm", "ms")
	if theirs, here := c.of("QEMU", "ms"); here && ours > theirs || !emulated() && ours > 30 {
		b.Errorf("%.1f ms to the guest's first byte, QEMU's microvm %.1f: promised are 30, and less than that", ours, theirs)
	}
}

// BenchmarkIdle is the cost of an idle VM, of govmm and its peers at the same time:
// memory beyond the guest's, that of it which no other process shares, and the share of
// a core.
func BenchmarkIdle(b *testing.B) {
	c := compare(b)
	pids := map[string]int{}
	for _, p := range c.peers {
		cmd := p.command(idleMemory/mib, idleGuest)
		_, end := firstByte(b, cmd)
		defer end()
		pids[p.name] = cmd.Process.Pid
	}
	const d = 5 * time.Second
	time.Sleep(3 * time.Second) // what start-up leaves behind
	for b.Loop() {
		before := map[string]time.Duration{}
		for name, pid := range pids {
			before[name] = runTime(b, pid)
		}
		time.Sleep(d)
		for _, p := range c.peers {
			pid := pids[p.name]
			_, beyond, private := residence(b, pid)
			c.add(p, "%-of-a-core", 100*float64(runTime(b, pid)-before[p.name])/float64(d))
			c.add(p, "MiB-beyond-RAM", float64(beyond)/mib)
			c.add(p, "private-MiB", float64(private)/mib)
		}
	}
	c.report("%-of-a-core", "MiB-beyond-RAM", "private-MiB")
	if share, _ := c.of("govmm", "%-of-a-core"); !emulated() && share > 1 {
		b.Errorf("an idle VM takes %.2f%% of a core: promised is 1", share)
	}
}

// runTime is the time that the threads of a process have run, in nanoseconds
// (sched-stats.rst): cpuTime counts in hundredths of a second.
func runTime(t testing.TB, pid int) (all time.Duration) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("threads of %d: %d, %v", pid, len(files), err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // the thread has ended
		}
		var ns int64
		if _, err := fmt.Sscan(string(text), &ns); err != nil {
			t.Fatalf("%s: %q", f, text)
		}
		all += time.Duration(ns)
	}
	return all
}
