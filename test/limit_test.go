package test

import (
	"strings"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// TestLimitedDiskMoves: a guest whose disk may move a byte a second, once the burst of
// 64 KiB is used up, waits for its requests. It is paused, resumed and migrated meanwhile;
// at the destination, where the command line says otherwise, its requests are carried out.
func TestLimitedDiskMoves(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const size = 2 * mib
	image := newImage(t, size)
	here := h.start("run", "here", "--memory", "64M", "--disk", "path="+image+",bps=1,bps-burst=64K", "--cmdline",
		"fill=8M dirty=2M rate=50 verify=1 tick=0.5 disk=2M drate=0")
	const burst = 2 * 64 << 10 / mempage.Size // pages: the burst, and a request of the guest that is owed
	moved := func(k tick) uint64 { return k.more["dwrites"] + k.more["dreads"] }
	_, next := here.out.awaitTick(t, 0, "the burst", func(k tick) bool { return moved(k) >= burst })
	h.must("pause", "here")
	h.must("resume", "here")
	here.out.awaitTick(t, next, "the guest goes on", func(tick) bool { return true })

	there, addr := h.receive("there", "--disk", "path="+image+",iops=100000")
	r, exit := h.migrate("here", "--to", addr, "--downtime-limit", "3s")
	if exit != 0 || r.Status != "completed" {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	for _, k := range here.out.ticks() {
		if moved(k) > burst {
			t.Errorf("%d pages were moved, and the limit is %d: %+v", moved(k), burst, k)
		}
	}
	if out := h.must("info", "there"); !strings.Contains(out, "at most 100000 operations/s") || strings.Contains(out, "1 B/s") {
		t.Errorf("expected the limit of the receiver alone:\n%s", out)
	}
	awaitDisk(t, there.out, 0, size/mempage.Size)
	h.must("stop", "--force", "there")
	if exit := there.wait(); exit != 0 {
		t.Errorf("exit %d", exit)
	}
	checkImage(t, image, size/mempage.Size)
}
