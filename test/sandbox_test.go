package test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/vmm/sandbox"
)

// sandboxOf is what govmm info says of a VM's sandbox.
func (h *host) sandboxOf(name string) sandbox.Status {
	h.t.Helper()
	var i struct{ Sandbox sandbox.Status }
	if out := h.must("info", name, "--json"); json.Unmarshal([]byte(out), &i) != nil {
		h.t.Fatalf("info --json printed %q", out)
	}
	return i.Sandbox
}

// caged checks each thread of a process in the sandbox: as many as there are vCPUs have
// the narrower filter, and no other has it.
func (p *proc) caged(vcpus int) {
	p.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.cmd.Process.Pid))
		if err != nil || len(tasks) == 0 {
			p.t.Fatalf("no threads: %v", err)
		}
		narrow, wrong := 0, ""
		for _, task := range tasks {
			b, err := os.ReadFile(task)
			if err != nil { // it has just ended
				continue
			}
			if strings.HasPrefix(string(b), "Name:\tkvm-") { // a thread of the kernel's, with what its first vCPU's thread had
				continue
			}
			has := func(line string) bool { return strings.Contains(string(b), "\n"+line+"\n") }
			for _, line := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"} {
				if !has(line) {
					wrong = task + ": no " + line + " in\n" + string(b)
				}
			}
			switch {
			case has("Seccomp_filters:\t2"):
				narrow++
			case !has("Seccomp_filters:\t1"):
				wrong = task + ": neither one filter nor two"
			}
		}
		if wrong == "" && narrow == vcpus {
			return
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%d of %d threads are narrow, expected %d; %s", narrow, len(tasks), vcpus, wrong)
		}
	}
}

// TestSandbox: both sides of a migration are in it from their start to their end, and each
// vCPU's thread is narrower, also after a reset.
func TestSandbox(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	run := h.start("run", "a", "--cpus", "2", "--vsock", "path="+filepath.Join(h.dir, "v"))
	_, at := run.out.awaitTick(t, 0, "a first one", func(tick) bool { return true })
	run.caged(2)
	receive, addr := h.receive("b", "--vsock", "path="+filepath.Join(h.dir, "w"))
	receive.caged(0)
	for _, name := range []string{"a", "b"} {
		if s := h.sandboxOf(name); s.Mode != sandbox.On || !s.Seccomp || s.Capabilities == nil || len(s.Capabilities) != 0 {
			t.Errorf("%s: %+v", name, s)
		}
	}
	if out := h.must("info", "a"); !strings.Contains(out, "sandbox     on, ") {
		t.Errorf("info printed %q", out)
	}
	run.typeLine("reboot")
	at = run.out.awaitText(t, at, "govmm demo guest")
	run.out.awaitTick(t, at, "one after the reset", func(tick) bool { return true })
	run.caged(2)
	if r, exit := h.migrate("a", "--to", addr); exit != 0 {
		t.Fatalf("%+v", r)
	}
	receive.out.awaitTick(t, 0, "one at the destination", func(tick) bool { return true })
	receive.caged(2)
	h.must("stop", "b", "--force")
	for _, p := range []*proc{run, receive} {
		if exit := p.wait(); exit != 0 || strings.Contains(p.err.tail(100), "sandbox") {
			t.Errorf("exit %d, %q", exit, p.err.tail(100))
		}
	}
}

// TestSandboxDropsCapabilities: a receiver keeps CAP_NET_ADMIN for its taps until its guest
// has arrived.
func TestSandboxDropsCapabilities(t *testing.T) {
	needKVM(t)
	testenv.NeedRoot(t, "CAP_NET_ADMIN")
	h := newHost(t)
	run := h.start("run", "a", "--net", "tap")
	run.out.awaitTick(t, 0, "a first one", func(tick) bool { return true })
	receive, addr := h.receive("b", "--net", "tap")
	if s := h.sandboxOf("b"); len(s.Capabilities) != 1 || s.Capabilities[0] != "net_admin" {
		t.Errorf("before: %+v", s)
	}
	if r, exit := h.migrate("a", "--to", addr); exit != 0 {
		t.Fatalf("%+v", r)
	}
	receive.caged(1)
}

// TestSandboxModes: log restricts nothing, off is off, and --migrate-ports bounds where a
// guest may go.
func TestSandboxModes(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	log := h.start("run", "log", "--sandbox", "log")
	for _, p := range []*proc{log, h.start("run", "off", "--sandbox", "off"), h.start("run", "ports", "--migrate-ports", "1,2")} {
		p.err.awaitText(t, 0, "its API socket is")
	}
	_, addr := h.receive("dst")
	for name, want := range map[string]string{"log": "log, seccomp", "off": "off"} {
		h.awaitInfo(name, "running guest", func(i info) bool { return i.State == "running" })
		if s := h.sandboxOf(name); s.String() != want {
			t.Errorf("%s: %q, expected %q", name, s, want)
		}
	}
	h.awaitInfo("ports", "running guest", func(i info) bool { return i.State == "running" })
	switch s := h.sandboxOf("ports"); {
	case s.Landlock < 4:
		t.Log("this kernel does not restrict ports")
	default:
		if r, exit := h.migrate("ports", "--to", addr); exit == 0 || !strings.Contains(r.Error, "permission denied") {
			t.Errorf("exit %d, %+v", exit, r)
		}
	}
	if r, exit := h.migrate("log", "--to", addr); exit != 0 {
		t.Errorf("exit %d, %+v", exit, r)
	}
	if log.wait(); strings.Contains(log.err.tail(100), "not allowed") {
		t.Errorf("%q", log.err.tail(100))
	}
}
