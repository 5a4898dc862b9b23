package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"golang.org/x/sys/unix"
)

// TestMemoryThatTheHostLacks: run and receive refuse a guest that is larger than the
// memory of this host by the same rule, in one line with the numbers, which a source does
// not read; with overcommit both take it.
func TestMemoryThatTheHostLacks(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	var host unix.Sysinfo_t
	if err := unix.Sysinfo(&host); err != nil {
		t.Fatal(err)
	}
	size := uint64(host.Totalram)*uint64(host.Unit)/mib + 1024
	run := []string{"run", "big", "--memory", fmt.Sprintf("%dM", size), "--cmdline", "fill=8M dirty=1M verify=1 tick=1"}
	says := fmt.Sprintf("memory of %d MiB (anonymous): ", size)
	const remedy = "; make it smaller, or allow overcommit"

	_, errs, exit := h.run(run...)
	if exit == 0 || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, says) || !strings.HasSuffix(errs, remedy+"\n") {
		t.Errorf("run: exit %d, %q", exit, errs)
	}
	src := h.start(append(run, "--overcommit")...)
	src.out.awaitText(t, 0, "filled ")
	dst, addr := h.receive("there")
	r, exit := h.migrate("big", "--to", addr)
	if exit < 3 || len(r.Rounds) != 0 || !strings.HasSuffix(r.Error, "refused by the destination: "+says+"this host has too little; see the destination's log") {
		t.Errorf("receive: exit %d, %+v", exit, r)
	}
	dst.err.awaitText(t, 0, remedy)
	dst.kill(unix.SIGKILL)
	dst.wait()
	dst, addr = h.receive("there", "--overcommit")
	if r, exit := h.migrate("big", "--to", addr); exit != 0 {
		t.Errorf("with overcommit: %+v", r)
	}
	awaitVerified(t, dst.out, 0, 2048)
}

// TestMemoryThatTheGroupLacks: a limit of a control group counts, of one above the
// process's as well.
func TestMemoryThatTheGroupLacks(t *testing.T) {
	needKVM(t)
	testenv.NeedRoot(t, "it makes control groups")
	limit, root := "memory.limit_in_bytes", "/sys/fs/cgroup/memory"
	if _, err := os.Stat(root); err != nil {
		limit, root = "memory.max", "/sys/fs/cgroup"
		if all, _ := os.ReadFile(root + "/cgroup.subtree_control"); !strings.Contains(string(all), "memory") {
			t.Skip("SKIPPED: no memory controller is mounted")
		}
	}
	above, err := os.MkdirTemp(root, "govmm-test-")
	if err != nil {
		t.Skipf("SKIPPED: control groups cannot be made here: %v", err)
	}
	group := filepath.Join(above, "one")
	t.Cleanup(func() { _, _ = os.Remove(group), os.Remove(above) })
	put := func(file, text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put(filepath.Join(above, limit), strconv.Itoa(300*mib))
	if limit == "memory.max" {
		put(filepath.Join(above, "cgroup.subtree_control"), "+memory")
	}
	if err := os.Mkdir(group, 0o700); err != nil {
		t.Fatal(err)
	}
	h := newHost(t)
	h.via = []string{"sh", "-c", `echo $$ > "$0/cgroup.procs" && exec "$@"`, group}

	_, errs, exit := h.run("run", "vm", "--memory", "301M")
	if exit == 0 || !strings.Contains(errs, "memory of 301 MiB (anonymous): the control group "+above+" has ") || !strings.Contains(errs, " MiB available, of 300 MiB ("+limit+")") {
		t.Errorf("more than the limit: exit %d, %q", exit, errs)
	}
	vm := h.start("run", "vm", "--memory", "64M", "--cmdline", "fill=8M dirty=1M")
	vm.out.awaitText(t, 0, "filled ")
	vm.kill(unix.SIGKILL)
	vm.wait()
}
