package test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/govmm/govmm/test/kernel"
)

// A Linux guest takes its time to boot, where ring 0 is emulated a minute and more. So one
// boots once for each description that tests have, is kept in a snapshot, and each test
// restores that: it goes on at its first process, which has checked its memory.

// booting is one that has booted, or is about to.
type booting struct {
	once sync.Once
	dir  string // the snapshot; "": it did not boot
}

var (
	bootingMu  sync.Mutex // guards the two below
	bootings   = map[string]*booting{}
	bootedRoot string
)

// removeBooted removes all snapshots.
func removeBooted() {
	if bootedRoot != "" {
		_ = os.RemoveAll(bootedRoot)
	}
}

// booted returns the guest's snapshot. devices are what the guest gets of this host at its
// boot, beside l.args; whoever restores it gives others.
func (l *linux) booted(t testing.TB, devices ...string) *booting {
	t.Helper()
	if l.root {
		t.Fatal("a root disk belongs to one guest")
	}
	key := fmt.Sprintf("%+v", *l)
	bootingMu.Lock()
	b := bootings[key]
	if b == nil {
		b = new(booting)
		bootings[key] = b
	}
	if bootedRoot == "" {
		var err error
		if bootedRoot, err = os.MkdirTemp("", "govmm-booted-"); err != nil {
			t.Fatal(err)
		}
	}
	at := filepath.Join(bootedRoot, fmt.Sprint(len(bootings)))
	bootingMu.Unlock()
	b.once.Do(func() {
		with := *l
		with.args = append(append([]string{}, l.args...), devices...)
		h := newHost(t)
		vm := with.run(h, "linux", with.prepare(t))
		vm.awaitBoot()
		h.mustSnapshot("linux", "--to", at, "--stop", "--downtime-limit", "3s", "--hints", "off")
		if exit := vm.wait(); exit != 0 {
			t.Fatalf("a guest that was kept exits %d", exit)
		}
		b.dir = at
	})
	if b.dir == "" {
		t.Fatal("the guest did not boot, for another test")
	}
	return b
}

// restore runs a copy of the guest, in memory that its report can be read from.
func (b *booting) restore(h *host, name string, args ...string) *proc {
	h.t.Helper()
	p := h.start(append([]string{"run", name, "--from", b.dir, "--restore", "eager", "--memory-backing", "memfd"}, args...)...)
	p.err.awaitText(h.t, 0, "runs; its API socket is") // its memory is complete before that
	return p
}

// everyDevice is a guest with every device and an address of its own.
func everyDevice() *linux {
	return &linux{variant: kernel.NoACPI, cpus: 2, memory: "256M", program: "memhog", words: "size=32M idle=100",
		kernel: "ip=" + everyDeviceIP + "::10.9.0.1:255.255.255.0::eth0:off", args: []string{"--console", "null"}}
}

const everyDeviceIP = "10.9.0.2"

// TestLinuxSnapshots: a Linux guest is restored again and again, lazily and eagerly, and
// kept again: each word that its process checks is what it wrote, and its kernel has
// nothing to complain of. A guest that was restored lazily moves on.
func TestLinuxSnapshots(t *testing.T) {
	needKVM(t)
	needRoot(t)
	t.Parallel()
	disk, another := content(t, 8*mib), content(t, 8*mib)
	b := everyDevice().booted(t, "--disk", disk, "--net", "tap")
	h := newHost(t)
	here := []string{"--disk", disk, "--net", "tap", "--console", "null"}
	dir := b.dir
	for i := range count(1, 5) {
		lazy := h.start(append([]string{"run", fmt.Sprintf("lazy%d", i), "--from", dir, "--new-identity"}, here...)...)
		name := fmt.Sprintf("eager%d", i)
		eager := (&booting{dir: dir}).restore(h, name, "--disk", another, "--net", "tap", "--console", "null")
		r := eager.awaitBoot()
		eager.goesOn(r)
		eager.quietly(0)
		there, addr := h.receive(fmt.Sprintf("there%d", i), append(here[:4:4], "--console", "null", "--memory-backing", "memfd")...)
		if got, exit := h.migrate(fmt.Sprintf("lazy%d", i), "--to", addr, "--downtime-limit", "3s"); exit != 0 || got.Status != "completed" {
			t.Fatalf("a guest that was restored lazily does not move: exit %d, %+v", exit, got)
		}
		lazy.quietly(0)
		there.goesOn(there.awaitBoot())
		there.quietly(0)
		next := filepath.Join(t.TempDir(), "next")
		got := h.mustSnapshot(name, "--to", next, "--downtime-limit", "3s")
		t.Logf("kept: stood still for %.1f ms, %d ms in all", got.Migration.DowntimeMS, got.Migration.TotalMS)
		for _, n := range []string{name, fmt.Sprintf("there%d", i)} {
			h.must("stop", n, "--force")
		}
		dir = next
	}
}
