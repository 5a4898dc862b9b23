package test

import (
	"fmt"
	"testing"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/test/kernel"
)

// TestLinuxMovesWithEverything: a Linux guest with every device moves there and
// back while memhog rewrites memory: each word that it checks is what it wrote.
func TestLinuxMovesWithEverything(t *testing.T) {
	needKVM(t)
	needRoot(t)
	t.Parallel()
	here, disk := []string{"--console", "null"}, content(t, 8*mib)
	b := everyDevice().booted(t, "--disk", disk, "--net", "tap")
	h := newHost(t)
	vm := b.restore(h, "at0", append([]string{"--disk", disk, "--net", "tap"}, here...)...)
	r := vm.awaitBoot()
	for i := range 2 * count(1, 5) {
		name, last := fmt.Sprintf("at%d", i+1), fmt.Sprintf("at%d", i)
		next, addr := h.receive(name, append([]string{"--disk", disk, "--net", "tap"}, here...)...)
		got, exit := h.migrate(last, "--to", addr, "--downtime-limit", "3s")
		if exit != 0 || got.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, got)
		}
		vm.wait()
		r = next.goesOn(r)
		next.quietly(0)
		t.Logf("migration %d: %d ms, downtime %.1f ms; memhog is at pass %d, %d pages verified", i, got.TotalMS, got.DowntimeMS, r.Passes, r.Verified)
		vm = next
	}
}

// TestLinuxRootDiskMoves: a root disk that is read while the guest moves, more
// of it than its memory holds; each word read is checked.
func TestLinuxRootDiskMoves(t *testing.T) {
	needKVM(t)
	t.Parallel()
	l := linux{variant: kernel.NoACPI, cpus: 1, memory: "96M", program: "diskread", root: true, pages: 96 * mib / mempage.Size}
	f := l.prepare(t)
	h := newHost(t)
	vm := l.run(h, "at0", f)
	r := vm.awaitBoot()
	for i := range count(2, 6) {
		next, addr := h.receive(fmt.Sprintf("at%d", i+1), "--disk", f.root)
		got, exit := h.migrate(fmt.Sprintf("at%d", i), "--to", addr, "--downtime-limit", "3s")
		if exit != 0 || got.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, got)
		}
		vm.wait()
		since := r
		r = next.awaitReport("pages read from the disk", bootPatience, func(r kernel.Report) bool { return r.Verified > since.Verified+since.Pages/4 })
		next.quietly(0)
		vm = next
	}
}
