package test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
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

// TestRestoredAtOnce: several guests run from one snapshot at the same time, one of them
// moves on as soon as it runs, and one is kept again: no page is bad in any of them, and
// the snapshot stays as it was.
func TestRestoredAtOnce(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	dir := t.TempDir()
	const owned = 64 * mib / mempage.Size
	here := h.startDemo("s0", 2, 256, 64, 16)
	awaitVerified(t, here.out, 0, owned)
	at := filepath.Join(dir, "one")
	h.mustSnapshot("s0", "--to", at, "--stop")
	here.wait()
	var all []*proc
	for i := range 3 {
		all = append(all, h.start("run", fmt.Sprintf("c%d", i), "--from", at, "--restore", "lazy"))
	}
	all[0].out.awaitTick(t, 0, "any", func(tick) bool { return true })
	there, addr := h.receive("there")
	if r, exit := h.migrate("c0", "--to", addr); exit != 0 || r.Status != "completed" {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	awaitVerified(t, there.out, 0, owned)
	again := filepath.Join(dir, "two")
	h.mustSnapshot("c1", "--to", again)
	next := h.start("run", "next", "--from", again)
	for _, p := range []*proc{all[1], all[2], next} {
		awaitVerified(t, p.out, 0, owned)
	}
	h.must("snapshot", "--verify", at)
}

// TestSnapshotKilled: the command, or the VM, is killed at any moment of a snapshot. There
// is a whole snapshot or none; what is left of a draft is known by its name; and the guest
// goes on, unless it was killed.
func TestSnapshotKilled(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const owned = 32 * mib / mempage.Size
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	vm := h.startDemo("s", 1, 128, 32, 8)
	kept := 0
	for i := range count(6, 100) {
		dir := t.TempDir()
		at := filepath.Join(dir, "one")
		cmd := h.start("snapshot", "s", "--to", at, "--json")
		killVM := i%3 == 2
		time.Sleep(time.Duration(r.Int64N(int64(250 * time.Millisecond))))
		if killVM {
			vm.kill(syscall.SIGKILL)
		} else {
			cmd.kill(syscall.SIGKILL)
		}
		exit := cmd.wait()
		_, err := os.Stat(at)
		switch {
		case err == nil:
			kept++
			h.must("snapshot", "--verify", at)
		case exit == 0:
			t.Errorf("the command has succeeded, and there is no snapshot: %v", err)
		}
		list, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			if name := e.Name(); name != "one" && !strings.HasPrefix(name, ".govmm-partial-") || killVM && name != "one" {
				t.Errorf("%s is left (the VM was killed: %v)", name, killVM)
			}
		}
		if killVM {
			vm.wait()
			vm = h.startDemo("s", 1, 128, 32, 8)
			continue
		}
		from := vm.out.len()
		awaitVerified(t, vm.out, from, owned)
		h.awaitInfo("s", "guest that goes on", func(i info) bool { return i.State == "running" })
	}
	t.Logf("%d snapshots were complete before", kept)
}

// TestSnapshotDiskFull: where there is no room, one line says so, nothing is left, and the
// guest goes on, also if it was to end.
func TestSnapshotDiskFull(t *testing.T) {
	needKVM(t)
	needRoot(t)
	h := newHost(t)
	const owned = 64 * mib / mempage.Size
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=40m"); err != nil {
		t.Fatalf("mount a small tmpfs: %v", err)
	}
	defer func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	}()
	vm := h.startDemo("s", 1, 128, 64, 8)
	for _, more := range [][]string{nil, {"--stop"}, {"--compress", "zstd"}} {
		r, exit := h.snapshot(append([]string{"s", "--to", filepath.Join(small, "one")}, more...)...)
		if exit != 1 || r.Status != "failed" || !strings.Contains(r.Error, "no space left on device") || strings.Contains(r.Error, "\n") {
			t.Errorf("%v: exit %d, %s: %q", more, exit, r.Status, r.Error)
		}
		if list, err := os.ReadDir(small); err != nil || len(list) > 0 {
			t.Errorf("%v: left: %v, %v", more, list, err)
		}
		from := vm.out.len()
		awaitVerified(t, vm.out, from, owned)
	}
	h.mustSnapshot("s", "--to", filepath.Join(t.TempDir(), "one"))
}

// TestSnapshotWithDisk: the guest writes its disk all the time. The disk that is kept is of
// the same moment as its memory: the guest that is restored finds what it wrote.
func TestSnapshotWithDisk(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	dir := t.TempDir()
	image := filepath.Join(dir, "a.img")
	if err := os.WriteFile(image, make([]byte, 16*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	here := h.start("run", "s0", "--memory", "128M", "--disk", image, "--cmdline", "fill=16M dirty=4M verify=1 tick=1 disk=16M drate=0")
	here.out.awaitTick(t, 0, "writes", func(k tick) bool { return k.more["dwrites"] > 0 })
	for i := range count(2, 10) {
		at, name := filepath.Join(dir, fmt.Sprintf("one%d", i)), fmt.Sprintf("s%d", i+1)
		r := h.mustSnapshot(fmt.Sprintf("s%d", i), "--to", at, "--disks", "reflink")
		if len(r.Manifest.Disks) != 1 || r.Manifest.Disks[0].Kept == "none" {
			t.Fatalf("%+v", r.Manifest.Disks)
		}
		if _, errs, exit := h.run("run", name, "--from", at); exit != 1 || !strings.Contains(errs, "--disk-dir") {
			t.Errorf("without disks: exit %d, %s", exit, errs)
		}
		next := h.start("run", name, "--from", at, "--disk-dir", dir)
		base, _ := next.out.awaitTick(t, 0, "any", func(tick) bool { return true })
		k, _ := next.out.awaitTick(t, 0, "three passes over the disk", func(k tick) bool { return k.more["dwrites"] > base.more["dwrites"]+3*16*mib/mempage.Size })
		if k.more["dbad"] != 0 {
			t.Errorf("the disk is bad: %+v", k)
		}
		t.Logf("the disk is kept by %s; stood still for %.1f ms", r.Manifest.Disks[0].Kept, r.Migration.DowntimeMS)
		h.must("stop", "--force", fmt.Sprintf("s%d", i))
		here.wait()
		here = next
	}
}
