package test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// TestLinuxEveryWay: a Linux guest that answers ping while memhog rewrites its memory goes on
// by postcopies, upgrades, and snapshots that are restored: each word that memhog checks is
// what it wrote, the kernel has nothing to complain of, and no packet is answered twice.
func TestLinuxEveryWay(t *testing.T) {
	needKVM(t)
	a, _ := newSites(t)
	disk := content(t, 8*mib)
	b := everyDevice().booted(t, "--disk", disk, "--net", "tap")
	n := 0
	devices := func() []string {
		return []string{"--disk", disk, "--net", fmt.Sprintf("tap=gl%d,bridge=br0", n+1), "--console", "null"}
	}
	vm := b.restore(a.host, "at0", "--disk", disk, "--net", "tap=gl0,bridge=br0", "--console", "null")
	r := vm.awaitBoot()
	p := startPing(t, a, everyDeviceIP)
	p.await(3)
	early := 0
	arrived := func(next *proc) {
		t.Helper()
		if vm.wait() != 0 {
			t.Errorf("at%d exits %d", n, vm.exit)
		}
		vm, n = next, n+1
		r = vm.goesOn(r)
		vm.quietly(0)
		p.await(3)
	}
	for i := range count(1, 5) {
		next := a.start(append([]string{"receive", fmt.Sprintf("at%d", n+1), "--listen", a.ip + ":0", "--insecure", "--memory-backing", "memfd"}, devices()...)...)
		line := next.err.awaitText(t, 0, "listening on ")
		_, addr, _ := strings.Cut(next.err.snapshot()[line], "listening on ")
		got, exit := a.migrate(fmt.Sprintf("at%d", n), "--to", strings.TrimSpace(addr), "--postcopy=1", "--downtime-limit", "1ms", "--bandwidth-limit", "100M")
		if exit != 0 || got.Status != "completed" {
			t.Fatalf("postcopy %d: exit %d, %+v", i, exit, got)
		}
		if got.Postcopy != nil {
			early++
			t.Logf("postcopy %d: downtime %.1f ms, %+v", i, got.DowntimeMS, *got.Postcopy)
		}
		arrived(next)

		binary := govmm
		if i%2 == 0 {
			binary = nextBuild(t)
		}
		up := a.mustUpgrade(fmt.Sprintf("at%d", n), "--binary", binary)
		vm.memoryOf = up.PID
		r = vm.goesOn(r)
		p.await(3)
		t.Logf("upgrade %d: downtime %.1f ms", i, up.DowntimeMS)

		at := filepath.Join(t.TempDir(), "kept")
		kept := a.mustSnapshot(fmt.Sprintf("at%d", n), "--to", at, "--stop")
		next = (&booting{dir: at}).restore(a.host, fmt.Sprintf("at%d", n+1), devices()...)
		t.Logf("snapshot %d: %d MiB, %d ms; memhog is at pass %d, %d pages verified", i, kept.FileBytes>>20, kept.Migration.TotalMS, r.Passes, r.Verified)
		arrived(next)
	}
	if early == 0 {
		t.Error("no guest moved before all of its memory had")
	}
	sent, lost, twice := p.end()
	t.Logf("%d packets sent, %d lost (while it was kept on disk, too), %d answered twice", sent, lost, twice)
	if twice > 0 {
		t.Errorf("%d packets were answered twice", twice)
	}
}
