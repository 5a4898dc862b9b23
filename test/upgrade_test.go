package test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"

	"github.com/govmm/govmm/vmm/api"
)

// upgraded is what upgrade --json prints.
type upgraded struct {
	result
	Memory  string `json:"memory"`
	OldPID  int    `json:"old_pid"`
	PID     int    `json:"pid"`
	Version string `json:"version"`
}

// upgrade runs govmm upgrade --json to its end.
func (h *host) upgrade(args ...string) (upgraded, string, int) {
	h.t.Helper()
	out, errs, exit := h.run(append([]string{"upgrade", "--json"}, args...)...)
	var r upgraded
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		h.t.Fatalf("upgrade --json printed %q (%q): %v", out, errs, err)
	}
	return r, errs, exit
}

// mustUpgrade is upgrade that has to succeed.
func (h *host) mustUpgrade(args ...string) upgraded {
	h.t.Helper()
	r, errs, exit := h.upgrade(args...)
	if exit != 0 || r.Status != "completed" {
		h.t.Fatalf("upgrade %s: exit %d, %+v\n%s", strings.Join(args, " "), exit, r, errs)
	}
	if r.PID == r.OldPID || r.PID == 0 {
		h.t.Errorf("upgrade from process %d to %d", r.OldPID, r.PID)
	}
	return r
}

// otherBuild builds govmm with another version.
var otherBuild = sync.OnceValues(func() (string, error) {
	path := filepath.Join(filepath.Dir(govmm), "govmm-next")
	build := exec.Command("go", "build", "-ldflags", "-X main.gitVersion=v9.9.9-test", "-o", path, "../cmd/govmm")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return path, nil
})

func nextBuild(t testing.TB) string {
	t.Helper()
	path, err := otherBuild()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestUpgrade: a guest with two vCPUs and devices goes on through upgrades between two
// builds, under each backing, mixed with migrations. One process prints all of its output, no
// tick is missing and no page is bad. Where the memory is shared nothing of it is sent.
func TestUpgrade(t *testing.T) {
	needKVM(t)
	const mem, fill = 256, 128
	for _, backing := range []string{"memfd", "hugetlb", "anonymous"} {
		t.Run(backing, func(t *testing.T) {
			if backing == "hugetlb" {
				reserveHugePages(t, 2*mem/2+8) // a migration needs it twice, an upgrade does not
			}
			h := newHost(t)
			image := newImage(t, 8*mib)
			devices := []string{"--disk", image, "--console", "null"}
			p := h.start(append([]string{"run", "u0", "--cpus", "2", "--memory", fmt.Sprintf("%dM", mem), "--memory-backing", backing, "--balloon",
				"--cmdline", fmt.Sprintf("fill=%dM dirty=16M rate=0 verify=1 tick=0.5 disk=1M", fill)}, devices...)...)
			filled := p.out.awaitText(t, 0, "filled ")
			awaitDisk(t, p.out, filled, 1)
			var downtimes []float64
			name, moves := "u0", 0
			for i := range count(6, 50) {
				binary := govmm
				if i%2 == 0 {
					binary = nextBuild(t)
				}
				from := p.out.len()
				r := h.mustUpgrade(name, "--binary", binary)
				if shared := backing != "anonymous"; shared != (r.Memory == "shared") || shared != (r.PagesSent == 0) || shared && r.BytesSent > mib {
					t.Errorf("upgrade %d: memory %s, %d pages and %d bytes were sent", i, r.Memory, r.PagesSent, r.BytesSent)
				}
				if want := i%2 == 0; strings.HasPrefix(r.Version, "v9.9.9-test") != want {
					t.Errorf("upgrade %d: version %q", i, r.Version)
				}
				if pid := h.info(name).PID; pid != r.PID {
					t.Errorf("upgrade %d: process %d answers, expected %d", i, pid, r.PID)
				}
				downtimes = append(downtimes, r.DowntimeMS)
				p.out.awaitTick(t, from+1, "after the upgrade", func(tick) bool { return true })
				awaitDisk(t, p.out, p.out.len(), 1)
				if locks(r.OldPID, image) || !locks(r.PID, image) {
					t.Errorf("upgrade %d: the disk is locked by the old process: %v, by the new one: %v", i, locks(r.OldPID, image), locks(r.PID, image))
				}
				if i%4 == 1 { // and to another VM, whose process then is the one to be upgraded
					moves++
					last := name
					name = fmt.Sprintf("u%d", moves)
					there, addr := h.receive(name, append([]string{"--memory-backing", backing}, devices...)...)
					m, exit := h.migrate(last, "--to", addr, "--downtime-limit", "3s")
					if exit != 0 {
						t.Fatalf("migration %d: %+v", moves, m)
					}
					if p.wait() != 0 {
						t.Errorf("migration %d: the attendant exits %d", moves, p.exit)
					}
					checkTicks(t, p)
					p = there
				}
			}
			awaitVerified(t, p.out, 0, fill*mib/mempage.Size)
			t.Logf("downtimes in ms: %.1f", downtimes)
			h.must("stop", "--force", name)
			if exit := p.wait(); exit != 0 {
				t.Errorf("the process that was started exits %d", exit)
			}
			checkTicks(t, p)
			checkImage(t, image, mib/mempage.Size)
		})
	}
}

// checkTicks checks that a process has printed each tick once, with no page bad.
func checkTicks(t *testing.T, p *proc) {
	t.Helper()
	all := p.out.ticks()
	for i, k := range all {
		if k.bad != 0 || i > 0 && k.n != all[i-1].n+1 {
			t.Errorf("tick %d follows tick %d, %d pages are bad", k.n, all[max(i-1, 0)].n, k.bad)
		}
	}
}

// TestUpgradeAPINeverRefuses: whoever connects to the API socket during upgrades is served,
// and always told of a guest that runs.
func TestUpgradeAPINeverRefuses(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	h.start("run", "a", "--memory", "64M", "--memory-backing", "memfd", "--cmdline", "fill=8M tick=1").out.awaitText(t, 0, "filled ")
	c := api.Open(filepath.Join(h.dir, "govmm", "a.sock"))
	stop := make(chan struct{})
	var all sync.WaitGroup
	var mu sync.Mutex
	asked, pids := 0, map[int]bool{}
	for range 2 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				info, err := c.Info(context.Background())
				mu.Lock()
				asked++
				if err != nil {
					t.Errorf("request %d: %v", asked, err)
				} else if info.State != "running" && info.State != "migrating" {
					t.Errorf("request %d: state %s of process %d", asked, info.State, info.PID)
				}
				pids[info.PID] = true
				mu.Unlock()
			}
		})
	}
	n := count(8, 50)
	for range n {
		h.mustUpgrade("a")
	}
	close(stop)
	all.Wait()
	t.Logf("%d requests, %d processes answered", asked, len(pids))
	if len(pids) < n {
		t.Errorf("%d processes answered, expected %d", len(pids), n)
	}
}

// TestUpgradeFails: whatever the new binary is, the guest goes on where it is, and one line
// says why.
func TestUpgradeFails(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	p := h.start("run", "a", "--memory", "64M", "--memory-backing", "memfd", "--cmdline", "fill=16M dirty=4M rate=0 verify=1 tick=0.5")
	p.out.awaitText(t, 0, "filled ")
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	answer := strings.TrimSpace(must(exec.Command(govmm, "__take-over", "--check").Output()))
	knows := "#!/bin/sh\nif [ \"$2\" = --check ]; then echo '" + answer + "'; exit 0; fi\n"
	for _, c := range []struct {
		name, binary, want string
	}{
		{"absent", filepath.Join(dir, "none"), "no such program"},
		{"not executable", write("plain", "#!/bin/sh\n", 0o644), "may be started"},
		{"of no processor", write("junk", "\x7fELFjunk", 0o755), "no program of this processor"},
		{"another program", "/bin/true", "it is no govmm"},
		{"prints without end", write("yes", "#!/bin/sh\nexec yes govmm\n", 0o755), "it is no govmm"},
		{"prints 1 GB", write("gb", "#!/bin/sh\nhead -c 1000000000 /dev/zero\n", 0o755), "it is no govmm"},
		{"an older protocol", write("old", "#!/bin/sh\necho 'govmm-take-over 0 v0.0.1'\n", 0o755), `version "0"`},
		{"ends at once", write("ends", knows+"exit 3\n", 0o755), "ended before it was ready"},
		{"prints and ends", write("prints", knows+"echo 'it is broken' >&2; exit 3\n", 0o755), "it printed: it is broken"},
		{"prints 1 GB later", write("gblater", knows+"head -c 1000000000 /dev/zero >&2; exit 1\n", 0o755), "ended before it was ready"},
		{"talks nonsense", write("nonsense", knows+"yes >&3\n", 0o755), "expected a message"},
		{"crashes when it has been greeted", write("crash", knows+"exec 4<&-; exec '"+govmm+"' __take-over /nowhere on\n", 0o755), "it cannot take the guest over"},
		{"does nothing", write("sleeps", knows+"exec sleep 600\n", 0o755), "within 10s"},
		{"knows another sandbox", write("flag", knows+"exec '"+govmm+"' __take-over \"$2\" nonsense\n", 0o755), "nonsense"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, said := h.info("a").PID, p.err.len()
			r, errs, exit := h.upgrade("a", "--binary", c.binary)
			if exit != 1 || r.Status != "failed" || !strings.Contains(errs, c.want) || !strings.Contains(r.Error, c.want) {
				t.Errorf("exit %d, status %q, error %q, stderr %q; expected one line with %q", exit, r.Status, r.Error, errs, c.want)
			}
			if lines := strings.Count(errs, "\n"); lines != 1 {
				t.Errorf("%d lines: %q", lines, errs)
			}
			if n := p.err.len() - said; n > 1 {
				t.Errorf("the VM's process said %d lines:\n%s", n, p.err.tail(n))
			}
			if i := h.info("a"); i.PID != before || i.State != "running" {
				t.Errorf("process %d is %s, expected process %d that runs", i.PID, i.State, before)
			}
		})
	}
	awaitVerified(t, p.out, p.out.len(), 16*mib/mempage.Size)
	h.mustUpgrade("a") // nothing is left of the attempts
	awaitVerified(t, p.out, p.out.len(), 16*mib/mempage.Size)
	checkTicks(t, p)
}

func must(b []byte, err error) string {
	if err != nil {
		panic(err)
	}
	return string(b)
}

// childOf returns the process that a command has started to take a guest over, 0 if it is
// not there.
func childOf(pid int) int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range tasks {
		more, _ := os.ReadFile(f)
		text = append(text, more...)
	}
	for _, word := range strings.Fields(string(text)) {
		cmdline, _ := os.ReadFile("/proc/" + word + "/cmdline")
		if strings.Contains(string(cmdline), "__take-over\x00") && !strings.Contains(string(cmdline), "--check") {
			var n int
			_, _ = fmt.Sscan(word, &n)
			return n
		}
	}
	return 0
}

// TestUpgradeKilled: the new process is killed at random moments. If it had not taken the
// guest it goes on in the old one; if it had, the VM has ended as any whose process is
// killed. No page is lost.
func TestUpgradeKilled(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	var p *proc
	start := func() {
		p = h.start("run", "a", "--memory", "64M", "--memory-backing", "memfd", "--cmdline", "fill=16M dirty=4M rate=0 verify=1 tick=0.2")
		p.out.awaitText(t, 0, "filled ")
	}
	start()
	stayed, moved, ended := 0, 0, 0
	n := count(20, 100)
	for i := range n {
		up := h.start("upgrade", "a", "--json")
		child := 0
		for limit := time.Now().Add(patience); child == 0 && time.Now().Before(limit); {
			child = childOf(up.cmd.Process.Pid)
			select {
			case <-up.done:
				limit = time.Time{}
			default:
			}
		}
		// An upgrade takes some tens of milliseconds here, most of it to start the process.
		time.Sleep(time.Duration(i%25) * 3 * time.Millisecond)
		if child != 0 {
			_ = syscall.Kill(child, syscall.SIGKILL)
		}
		up.wait()
		select {
		case <-p.done:
		case <-time.After(200 * time.Millisecond): // the attendant has noticed by then, or soon
		}
		out, _, exit := h.run("info", "a", "--json")
		var now info
		if exit == 0 && json.Unmarshal([]byte(out), &now) != nil {
			t.Fatalf("info printed %q", out)
		}
		switch {
		case exit != 0:
			ended++
			if p.wait() != 1 || !strings.Contains(p.err.tail(3), "ended without a word") {
				t.Errorf("kill %d: the attendant exits %d and says %q", i, p.exit, p.err.tail(3))
			}
			checkTicks(t, p)
			start()
		case now.PID == child: // it was killed too late for that, or had not been there
			t.Errorf("kill %d: a process that was killed answers", i)
		default:
			stayed++
			if now.State != "running" {
				t.Errorf("kill %d: the guest is %s", i, now.State)
			}
			from := p.out.len()
			p.out.awaitTick(t, from, "the guest goes on", func(tick) bool { return true })
		}
	}
	t.Logf("%d kills: %d before the new process had the guest, %d after", n, stayed, ended)
	_ = moved
	awaitVerified(t, p.out, p.out.len(), 16*mib/mempage.Size)
	checkTicks(t, p)
}

// TestUpgradeSignals: who has started the VM's process signals it and waits for it as
// before, also after several upgrades.
func TestUpgradeSignals(t *testing.T) {
	needKVM(t)
	for name, c := range map[string]struct {
		do   func(h *host, p *proc, r upgraded)
		exit int
		says string
	}{
		"SIGTERM":          {func(_ *host, p *proc, _ upgraded) { p.kill(syscall.SIGTERM) }, 0, "stopped"},
		"SIGINT":           {func(_ *host, p *proc, _ upgraded) { p.kill(syscall.SIGINT) }, 0, "stopped"},
		"stop":             {func(h *host, _ *proc, _ upgraded) { h.must("stop", "--force", "a") }, 0, "stopped"},
		"the guest":        {func(_ *host, p *proc, _ upgraded) { p.typeLine("poweroff") }, 0, "powered off"},
		"it is killed":     {func(_ *host, _ *proc, r upgraded) { _ = syscall.Kill(r.PID, syscall.SIGKILL) }, 1, "ended without a word"},
		"the other one is": {func(_ *host, p *proc, _ upgraded) { p.kill(syscall.SIGKILL) }, -1, ""},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			p := h.start("run", "a", "--memory", "64M", "--memory-backing", "memfd", "--cmdline", "fill=8M tick=0.5")
			p.out.awaitText(t, 0, "filled ")
			h.mustUpgrade("a")
			r := h.mustUpgrade("a")
			if r.OldPID == p.cmd.Process.Pid {
				t.Error("the second upgrade is from the process that was started")
			}
			p.out.awaitTick(t, p.out.len(), "in the new process", func(tick) bool { return true })
			c.do(h, p, r)
			if exit := p.wait(); exit != c.exit {
				t.Errorf("exit %d, expected %d", exit, c.exit)
			}
			if text := p.err.tail(5); !strings.Contains(text, c.says) {
				t.Errorf("the last lines do not say %q:\n%s", c.says, text)
			}
			for limit := time.Now().Add(patience); syscall.Kill(r.PID, 0) == nil; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(limit) {
					t.Fatalf("process %d does not end", r.PID)
				}
			}
			checkTicks(t, p)
		})
	}
}

// TestUpgradeServiceManager: a service manager is told of the new process, and the old one
// ends.
func TestUpgradeServiceManager(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	path := filepath.Join(h.dir, "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	told := func() string {
		t.Helper()
		_ = manager.SetReadDeadline(time.Now().Add(patience))
		buf := make([]byte, 1000)
		n, err := manager.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	t.Setenv("NOTIFY_SOCKET", path)
	serial := filepath.Join(h.dir, "serial")
	p := h.start("run", "a", "--memory", "64M", "--memory-backing", "memfd", "--serial", "file:"+serial, "--cmdline", "fill=8M dirty=1M rate=0 verify=1 tick=0.2")
	if text := told(); text != "READY=1" {
		t.Errorf("the manager was told %q", text)
	}
	os.Unsetenv("NOTIFY_SOCKET")
	ticks := func(n int) { // waits until the guest has printed so many
		t.Helper()
		for limit := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
			text, _ := os.ReadFile(serial)
			if strings.Count(string(text), "tick ") > n { // one is in the banner
				return
			}
			if time.Now().After(limit) {
				t.Fatalf("no %d ticks in %q", n, text)
			}
		}
	}
	var last upgraded
	for i := range 3 {
		ticks(2 * (i + 1))
		last = h.mustUpgrade("a")
		if text := told(); text != fmt.Sprintf("MAINPID=%d", last.PID) {
			t.Errorf("upgrade %d: the manager was told %q, the new process is %d", i, text, last.PID)
		}
		t.Cleanup(func() { _ = syscall.Kill(last.PID, syscall.SIGKILL) })
		awaitZombie(t, last.OldPID)
		if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", last.PID)); err != nil || !strings.Contains(string(status), "Seccomp:\t2") {
			t.Errorf("upgrade %d: the new process is not in the sandbox (%v)", i, err)
		}
	}
	ticks(8)
	h.must("stop", "--force", "a")
	if text := told(); text != "STOPPING=1" {
		t.Errorf("at the end the manager was told %q", text)
	}
	awaitZombie(t, last.PID)
	if p.wait() != 0 {
		t.Errorf("the process that was started exits %d", p.exit)
	}
	l := newLines()
	f, err := os.Open(serial)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l.from(f)
	before := 0
	for _, k := range l.ticks() {
		if k.n != before+1 || k.bad != 0 {
			t.Errorf("tick %d follows tick %d, %d pages are bad", k.n, before, k.bad)
		}
		before = k.n
	}
	if before == 0 {
		t.Error("no tick was written")
	}
}

// awaitZombie waits until a process has ended. Its output has not: the new process has it.
func awaitZombie(t *testing.T, pid int) {
	t.Helper()
	for limit := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(limit) {
			t.Fatalf("process %d does not end", pid)
		}
	}
}
