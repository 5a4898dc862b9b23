package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/test/kernel"
)

// TestLinuxDiskMovesAlong: Linux moves there and back with the ext4 that it has its root on,
// while a process writes, flushes, truncates, renames and reads files there. At its end the
// file system is clean, the files are what was written, and nothing else has stayed behind.
func TestLinuxDiskMovesAlong(t *testing.T) {
	needKVM(t)
	testenv.NeedTools(t, "mke2fs", "e2fsck", "debugfs")
	t.Parallel()
	vmlinux, err := kernel.Build(kernel.Disk)
	testenv.Check(t, err)
	program, err := kernel.Program("diskwriter", 0)
	testenv.Check(t, err)
	m := &diskMover{t: t, h: newHost(t), dirs: [2]string{t.TempDir(), t.TempDir()}}
	testenv.Check(t, kernel.Ext4(m.image(), 64*mib, program))
	m.proc = m.h.start("run", m.name(), "--memory", "128M", "--memory-backing", "memfd", "--kernel", vmlinux, "--disk", m.image(),
		"--cmdline", "console=ttyS0 "+kernel.Cmdline+" root=/dev/vda rootfstype=ext4 rootflags=discard rw init=/init")
	r := m.proc.awaitBoot()
	for i := range 2 * count(2, 50) {
		there, addr := m.receive()
		got, exit := m.h.migrate(m.name(), "--to", addr, "--copy-disks", "--downtime-limit", "3s")
		if exit != 0 || got.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, got)
		}
		m.proc.wait()
		m.proc.quietly(0)
		m.at, m.n, m.proc = 1-m.at, m.n+1, there
		m.strays(m.dirs[0], 1)
		m.strays(m.dirs[1], 1)
		since := r
		r = m.proc.awaitReport("files that were checked", bootPatience, func(r kernel.Report) bool { return r.Verified > since.Verified+8 && r.Written > since.Written+8 })
		t.Logf("migration %d: %d ms, downtime %.1f ms; %d blocks written, %d verified", i, got.TotalMS, got.DowntimeMS, r.Written, r.Verified)
	}
	m.proc.typeLine("end")
	m.proc.awaitLong(0, "diskwriter: done")
	m.proc.quietly(0)
	if r, ok := m.proc.report(); !ok || r.Bad != 0 {
		t.Errorf("the process says %+v, %v", r, ok)
	}
	m.h.must("stop", m.name(), "--force")
	m.proc.wait()
	checkExt4(t, m.image())
}

// checkExt4 checks a file system that diskwriter has left, and its files.
func checkExt4(t testing.TB, image string) {
	t.Helper()
	if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck -fn: %v\n%s", err, out)
	} else {
		t.Logf("e2fsck -fn:\n%s", out)
	}
	dir := t.TempDir()
	for _, name := range []string{"data", "sums"} {
		tool(t, "debugfs", "-R", fmt.Sprintf("rdump /%s %s", name, dir), image)
	}
	if list, err := os.ReadDir(filepath.Join(dir, "data")); err != nil || len(list) == 0 {
		t.Errorf("%d files, %v", len(list), err)
	}
	if err := kernel.CheckWritten(dir); err != nil {
		t.Error(err)
	}
}
