package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// diskMover is a guest with a disk that is moved between two directories, each of which stands
// for a host.
type diskMover struct {
	t    *testing.T
	h    *host
	dirs [2]string
	at   int // where the guest is
	n    int
	proc *proc
}

const movedDisk = 2 * mib

// newDiskMover starts a guest that writes, flushes, reads and checks its disk flat out.
func newDiskMover(t *testing.T, more ...string) *diskMover {
	m := &diskMover{t: t, h: newHost(t), dirs: [2]string{t.TempDir(), t.TempDir()}}
	image := newImage(t, 32*movedDisk)
	if err := os.Rename(image, m.image()); err != nil {
		t.Fatal(err)
	}
	m.proc = m.h.start("run", "c0", "--memory", "64M", "--disk", m.image(), "--cmdline",
		"fill=8M dirty=2M rate=50 verify=1 tick=0.3 disk=2M drate=0 "+strings.Join(more, " "))
	awaitDisk(t, m.proc.out, 0, movedDisk/mempage.Size)
	return m
}

func (m *diskMover) image() string { return filepath.Join(m.dirs[m.at], "disk.img") }

func (m *diskMover) name() string { return fmt.Sprintf("c%d", m.n) }

// receive starts the other side.
func (m *diskMover) receive() (there *proc, addr string) {
	return m.h.receive(fmt.Sprintf("c%d", m.n+1), "--disk-dir", m.dirs[1-m.at])
}

// moved notes that the guest has moved.
func (m *diskMover) moved(there *proc) {
	m.at, m.n, m.proc = 1-m.at, m.n+1, there
	awaitDisk(m.t, there.out, 0, movedDisk/mempage.Size)
}

// strays fails if a directory has anything but the disk.
func (m *diskMover) strays(dir string, want int) {
	m.t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		m.t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	if len(names) != want || want == 1 && names[0] != "disk.img" {
		m.t.Errorf("%s has %q, expected %d files", dir, names, want)
	}
}

// end stops the guest and checks its disk.
func (m *diskMover) end() {
	m.h.must("stop", "--force", m.name())
	m.proc.wait()
	checkImage(m.t, m.image(), movedDisk/mempage.Size)
}

// TestDiskMovesAlong: a guest moves there and back with its disk, which it writes flat out.
// The old copy is not started by mistake.
func TestDiskMovesAlong(t *testing.T) {
	needKVM(t)
	m := newDiskMover(t)
	for i := range count(3, 50) {
		there, addr := m.receive()
		r, exit := m.h.migrate(m.name(), "--to", addr, "--copy-disks", "--downtime-limit", "3s")
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, r)
		}
		old, from := m.image(), m.proc
		m.moved(there)
		from.wait()
		m.strays(m.dirs[0], 1)
		m.strays(m.dirs[1], 1)
		if i == 0 {
			_, errs, exit := m.h.run("run", "old", "--disk", old)
			if exit == 0 || !strings.Contains(errs, "--force") {
				t.Errorf("the old copy was started: exit %d, %q", exit, errs)
			}
			if st, err := os.Stat(m.image()); err != nil || st.Sys().(*syscall.Stat_t).Blocks*512 > 8*movedDisk {
				t.Errorf("the copy has no holes: %v, %v", st, err)
			}
		}
	}
	m.end()
}

// TestDiskMovesEarly: a guest that rewrites memory faster than its link carries goes early,
// there and back, with all of its disk, which it writes meanwhile.
func TestDiskMovesEarly(t *testing.T) {
	needKVM(t)
	m := newDiskMover(t, "fill=48M dirty=40M rate=0")
	for i := range count(2, 20) {
		there, addr := m.receive()
		r, exit := m.h.migrate(m.name(), "--to", addr, "--copy-disks", "--postcopy=1", "--downtime-limit", "100ms", "--bandwidth-limit", "40M")
		if exit != 0 || r.Status != "completed" || r.Postcopy == nil || r.Postcopy.Pages == 0 {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, r)
		}
		t.Logf("migration %d: downtime %.1f ms, %+v", i, r.DowntimeMS, *r.Postcopy)
		from := m.proc
		m.moved(there)
		from.wait()
		awaitVerified(t, there.out, 0, 48*mib/mempage.Size)
		m.strays(m.dirs[0], 1)
		m.strays(m.dirs[1], 1)
	}
	m.end()
}

// TestDiskMovesOnlyWhereAsked: what is refused, and leaves nothing behind.
func TestDiskMovesOnlyWhereAsked(t *testing.T) {
	needKVM(t)
	m := newDiskMover(t)
	there, addr := m.receive()
	r, exit := m.h.migrate(m.name(), "--to", addr)
	if exit == 0 || !strings.Contains(r.Error, "--copy-disks") {
		t.Errorf("without --copy-disks: exit %d, %+v", exit, r)
	}
	busy := filepath.Join(m.dirs[1], "disk.img")
	if err := os.WriteFile(busy, []byte("another disk"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, exit = m.h.migrate(m.name(), "--to", addr, "--copy-disks")
	if exit == 0 || r.Status != "failed" {
		t.Errorf("over a file that exists: exit %d, %+v", exit, r)
	}
	there.err.awaitText(t, 0, "and it exists")
	if b, err := os.ReadFile(busy); err != nil || string(b) != "another disk" {
		t.Errorf("the file that existed: %q, %v", b, err)
	}
	if err := os.Remove(busy); err != nil {
		t.Fatal(err)
	}
	m.strays(m.dirs[1], 0)
	_, errs, exit := m.h.run("receive", "both", "--listen", "127.0.0.1:0", "--disk-dir", m.dirs[1], "--disk", "path=x")
	if exit == 0 || !strings.Contains(errs, "not both") {
		t.Errorf("--disk-dir and --disk: exit %d, %q", exit, errs)
	}
	awaitDisk(t, m.proc.out, m.proc.out.len(), movedDisk/mempage.Size)
	r, exit = m.h.migrate(m.name(), "--to", addr, "--copy-disks", "--downtime-limit", "3s")
	if exit != 0 {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	m.moved(there)
	m.end()
}

// TestDiskMovesUnderKill: the destination is killed at any moment, over a slow link. The guest
// goes on with all that it has written, and no half of a copy stays.
func TestDiskMovesUnderKill(t *testing.T) {
	needKVM(t)
	m := newDiskMover(t)
	for i := range count(4, 100) {
		there, addr := m.receive()
		done := make(chan result, 1)
		go func() {
			r, _ := m.h.migrate(m.name(), "--to", addr, "--copy-disks", "--downtime-limit", "3s", "--bandwidth-limit", "40M", "--progress", "none")
			done <- r
		}()
		time.Sleep(time.Duration(i%10) * 15 * time.Millisecond)
		there.kill(syscall.SIGKILL)
		there.wait()
		r := <-done
		if r.Status == "completed" { // it arrived before, and died there
			t.Logf("migration %d completed before the kill", i)
			m.at, m.n = 1-m.at, m.n+1
			checkImage(t, m.image(), movedDisk/mempage.Size)
			return
		}
		m.strays(m.dirs[1-m.at], min(1, m.n))
		awaitDisk(t, m.proc.out, m.proc.out.len(), movedDisk/mempage.Size)
	}
	m.end()
}
