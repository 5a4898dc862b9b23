package test

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// snapshotResult is part of what snapshot --json prints.
type snapshotResult struct {
	Status   string `json:"status"`
	Error    string `json:"error"`
	Manifest struct {
		Memory struct {
			Bytes     uint64 `json:"bytes"`
			DataBytes uint64 `json:"data_bytes"`
		} `json:"memory"`
		Disks []struct {
			Kept string `json:"kept"`
		} `json:"disks"`
	} `json:"manifest"`
	FileBytes uint64 `json:"file_bytes"`
	Migration result `json:"migration"`
}

// snapshot runs govmm snapshot --json to its end.
func (h *host) snapshot(args ...string) (r snapshotResult, exit int) {
	h.t.Helper()
	out, errs, exit := h.run(append([]string{"snapshot", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		h.t.Fatalf("snapshot --json printed %q (%q): %v", out, errs, err)
	}
	return r, exit
}

// mustSnapshot takes one that has to succeed.
func (h *host) mustSnapshot(args ...string) snapshotResult {
	h.t.Helper()
	r, exit := h.snapshot(args...)
	if exit != 0 || r.Status != "completed" {
		h.t.Fatalf("snapshot %v: exit %d, %+v", args, exit, r)
	}
	return r
}

// restoring is a way in which a guest is restored.
type restoring struct {
	snapshot []string // more for govmm snapshot
	run      []string // more for govmm run
}

// TestSnapshots: a guest with two vCPUs that rewrites memory flat out, with pages that
// turn zero, hints and a balloon, goes from snapshot to snapshot, by every way, and on from
// each: no page is bad, neither in the guest that goes on nor in the one that is restored.
func TestSnapshots(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	dir := t.TempDir()
	const owned = 96 * mib / mempage.Size
	all := []restoring{
		{nil, []string{"--restore", "eager"}},
		{nil, []string{"--restore", "eager", "--memory-backing", "memfd"}},
		{[]string{"--compress", "zstd"}, nil},
		{nil, []string{"--restore", "lazy"}},
		{[]string{"--stop"}, nil},
		{nil, []string{"--restore", "lazy", "--dirty-tracking", "ring"}},
	}
	here := h.start("run", "s0", "--cpus", "2", "--memory", "256M", "--cmdline",
		"fill=96M dirty=16M rate=0 zeros=5 verify=1 tick=1 pool=64M keep=16M hintrace")
	here.out.awaitText(t, 0, "is ready in")
	awaitVerified(t, here.out, 0, owned)
	for i := range count(len(all), 50) {
		how, name := all[i%len(all)], fmt.Sprintf("s%d", i)
		at := filepath.Join(dir, name)
		r := h.mustSnapshot(append([]string{name, "--to", at}, how.snapshot...)...)
		if n := r.Manifest.Memory.DataBytes; n < 64*mib || n > r.Manifest.Memory.Bytes {
			t.Errorf("%d bytes of data in a guest that owns %d", n, owned*mempage.Size)
		}
		h.must("snapshot", "--verify", at)
		next := h.start(append([]string{"run", fmt.Sprintf("s%d", i+1), "--from", at}, how.run...)...)
		awaitVerified(t, next.out, 0, owned)
		if len(how.snapshot) == 1 { // --stop
			if here.wait() != 0 {
				t.Errorf("a VM that was saved exits %d", here.exit)
			}
		} else {
			from := here.out.len()
			awaitVerified(t, here.out, from, owned)
			h.must("stop", "--force", name)
		}
		t.Logf("%s %v: stood still for %.1f ms, %d ms in all", name, how, r.Migration.DowntimeMS, r.Migration.TotalMS)
		here = next
	}
}
