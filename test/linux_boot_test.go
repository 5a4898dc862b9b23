package test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/govmm/govmm/test/kernel"
)

// TestLinuxBoots: the test kernel boots to its first process, which checks its
// memory, with and without ACPI, with one and two vCPUs, from an initial RAM
// disk and from a virtio-blk root. Then the guest ends in one of the ways that
// there are.
func TestLinuxBoots(t *testing.T) {
	needKVM(t)
	t.Parallel()
	for _, c := range []struct {
		variant kernel.Variant
		cpus    int
		root    bool
		end     string
		always  bool // not only in the long runs
	}{
		{kernel.NoACPI, 2, false, "sysrq", true},
		{kernel.ACPI, 1, true, "button", true},
		{kernel.NoACPI, 1, true, "force", false},
		{kernel.NoACPI, 2, true, "force", false},
		{kernel.NoACPI, 1, false, "deaf", false},
		{kernel.ACPI, 2, true, "reset", false},
		{kernel.ACPI, 1, false, "panic", false},
		{kernel.ACPI, 2, false, "button", false},
	} {
		if !c.always && !full() {
			continue
		}
		from := "initramfs"
		if c.root {
			from = "disk"
		}
		t.Run(fmt.Sprintf("%s-%d-%s-%s", c.variant, c.cpus, from, c.end), func(t *testing.T) {
			t.Parallel()
			l := linux{variant: c.variant, cpus: c.cpus, memory: "192M", program: "memhog", words: "size=4M", root: c.root}
			h := newHost(t)
			vm := l.run(h, "linux", l.prepare(t))
			vm.awaitBoot()
			if want := fmt.Sprintf("Brought up 1 node, %d CPU", c.cpus); c.cpus > 1 {
				vm.out.awaitText(t, 0, want)
			}
			ends(t, h, vm, c.end)
		})
	}
}

// ends lets the guest end.
func ends(t *testing.T, h *host, vm *proc, how string) {
	t.Helper()
	outcome := ""
	switch how {
	case "sysrq": // the kernel powers off by itself; without ACPI it can only halt
		vm.sysrq("o")
		vm.out.awaitText(t, 0, "Power Off")
		h.must("stop", "linux", "--force")
		outcome = "stopped"
	case "button": // its driver listens, and no process acts on it
		if _, errs, exit := h.run("stop", "linux", "--timeout", "3s"); exit == 0 || !strings.Contains(errs, "it was asked to") {
			t.Errorf("stop of a guest with ACPI: exit %d, %q", exit, errs)
		}
		vm.sysrq("o")
		outcome = "powered off"
	case "force":
		h.must("stop", "linux", "--force")
		outcome = "stopped"
	case "deaf": // without ACPI nobody listens to the button
		if _, errs, exit := h.run("stop", "linux"); exit == 0 || !strings.Contains(errs, "--force") {
			t.Errorf("stop of a guest without ACPI: exit %d, %q", exit, errs)
		}
		h.must("stop", "linux", "--force")
		outcome = "stopped"
	case "reset":
		n := vm.out.len()
		vm.sysrq("b")
		vm.out.awaitText(t, n, "Linux version")
		vm.awaitBoot()
		vm.sysrq("o")
		outcome = "powered off"
	case "panic":
		vm.sysrq("c")
		vm.err.awaitText(t, 0, "the guest's kernel has panicked")
		return // panic=-1: it restarts
	}
	vm.err.awaitText(t, 0, outcome)
	if exit := vm.wait(); exit != 0 {
		t.Errorf("exit %d", exit)
	}
}
