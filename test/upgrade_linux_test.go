package test

import (
	"fmt"
	"testing"

	"github.com/govmm/govmm/test/kernel"
)

// TestLinuxUpgrade: a Linux guest with every device goes on in other processes while memhog
// rewrites its memory, mixed with migrations: each word that it checks is what it wrote.
func TestLinuxUpgrade(t *testing.T) {
	needKVM(t)
	needRoot(t)
	t.Parallel()
	l := linux{variant: kernel.NoACPI, cpus: 2, memory: "256M", program: "memhog", words: "size=32M idle=100"}
	here, disk := []string{"--console", "null"}, content(t, 8*mib)
	l.args = append([]string{"--disk", disk, "--net", "tap", "--memory-backing", "memfd"}, here...)
	h := newHost(t)
	vm := l.run(h, "at0", l.prepare(t))
	r := vm.awaitBoot()
	for i := range count(2, 5) {
		binary := govmm
		if i%2 == 0 {
			binary = nextBuild(t)
		}
		name := fmt.Sprintf("at%d", i)
		up := h.mustUpgrade(name, "--binary", binary)
		vm.memoryOf = up.PID
		r = vm.goesOn(r)
		t.Logf("upgrade %d: downtime %.1f ms; memhog is at pass %d, %d pages verified", i, up.DowntimeMS, r.Passes, r.Verified)
		next, addr := h.receive(fmt.Sprintf("at%d", i+1), append([]string{"--disk", disk, "--net", "tap", "--memory-backing", "memfd"}, here...)...)
		got, exit := h.migrate(name, "--to", addr, "--downtime-limit", "3s")
		if exit != 0 || got.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, got)
		}
		vm.wait()
		r = next.goesOn(r)
		next.quietly(0)
		vm = next
	}
}
