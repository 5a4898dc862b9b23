package test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// TestDiskMovesUnderFaults: either side is killed or the connections are cut, at any frame
// of a migration with a disk. The guest is at one side at most, with all that it has written;
// of a copy that is not complete nothing stays; and a guest whose process was killed starts
// from the disk that it had.
func TestDiskMovesUnderFaults(t *testing.T) {
	needKVM(t)
	m := &faultMover{t: t, h: newHost(t), dirs: [2]string{t.TempDir(), t.TempDir()}}
	if err := os.Rename(newImage(t, 32*movedDisk), m.image()); err != nil {
		t.Fatal(err)
	}
	m.start()
	frames := m.move("", 0).frames
	if frames < 5 {
		t.Fatalf("a migration takes %d frames", frames)
	}
	r := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	ends := map[string]int{}
	for i := range count(6, 100) {
		at := 1 + r.Int64N(frames)
		kind := []string{"destination", "cut", "source"}[i%3]
		end := m.move(kind, at)
		ends[kind+", then "+end.where]++
		if t.Failed() {
			t.Fatalf("fault %d: %s at frame %d of %d: the guest is %s: exit %d, %+v", i, kind, at, frames, end.where, end.exit, end.result)
		}
	}
	t.Logf("%d frames each; faults and where the guest was then: %v", frames, ends)
	m.h.must("stop", "--force", m.name)
	m.proc.wait()
	checkImage(t, m.image(), movedDisk/mempage.Size)
}

// faultMover is a guest with a disk that is moved between two directories, each of which
// stands for a host.
type faultMover struct {
	t    *testing.T
	h    *host
	dirs [2]string
	at   int // the directory of the guest's disk
	n    int // names so far
	name string
	proc *proc
}

func (m *faultMover) image() string { return filepath.Join(m.dirs[m.at], "disk.img") }

// start starts a guest from the disk.
func (m *faultMover) start() {
	m.t.Helper()
	m.n++
	m.name = fmt.Sprintf("f%d", m.n)
	m.proc = m.h.start("run", m.name, "--memory", "64M", "--disk", m.image(), "--force", "--cmdline",
		"fill=8M dirty=2M rate=50 verify=1 tick=0.2 disk=2M drate=0")
	awaitDisk(m.t, m.proc.out, 0, movedDisk/mempage.Size)
}

// ended is how a migration ended.
type ended struct {
	result result
	exit   int
	frames int64
	where  string
}

// move moves the guest, with a fault at a frame, and checks what is left.
func (m *faultMover) move(kind string, at int64) (e ended) {
	m.t.Helper()
	m.n++
	next := fmt.Sprintf("f%d", m.n)
	there, addr := m.h.receive(next, "--disk-dir", m.dirs[1-m.at])
	var n atomic.Int64
	proxy := newWireProxy(m.t, addr, func(bool, byte, uint64) bool {
		if n.Add(1) != at {
			return true
		}
		switch kind {
		case "destination":
			there.kill(syscall.SIGKILL)
			<-there.done
		case "source":
			m.proc.kill(syscall.SIGKILL)
			<-m.proc.done
		}
		return kind != "cut"
	})
	e.result, e.exit = m.h.migrate(m.name, "--to", proxy.addr, "--copy-disks", "--downtime-limit", "3s")
	e.frames = n.Load()
	struck := at > 0 && e.frames >= at
	switch {
	case struck && kind == "source":
		m.proc.wait()
		e.where = m.sourceKilled(there, next)
	case struck && kind == "destination":
		e.where = m.destinationKilled(there, e.exit)
	case e.exit == 0:
		m.proc.wait()
		m.goesOnThere(there, next)
		e.where = "there"
	default:
		there.kill(syscall.SIGKILL)
		there.wait()
		m.goesOnHere(there, "running")
		e.where = "here"
	}
	return e
}

// goesOnThere checks a guest that has arrived, and that both directories have its disk and nothing else.
func (m *faultMover) goesOnThere(there *proc, name string) {
	m.t.Helper()
	m.at, m.proc, m.name = 1-m.at, there, name
	awaitDisk(m.t, there.out, 0, movedDisk/mempage.Size)
	m.files(true)
}

// goesOnHere checks a guest that has not moved, and that nothing is left of its copy.
func (m *faultMover) goesOnHere(there *proc, state string) {
	m.t.Helper()
	if got := m.h.info(m.name).State; got != state {
		m.t.Errorf("the source is %q, expected %q", got, state)
	}
	if there.out.len() > 0 {
		m.t.Errorf("the guest ran at the destination too: %q", there.out.tail(3))
	}
	m.files(false)
	awaitDisk(m.t, m.proc.out, m.proc.out.len(), movedDisk/mempage.Size)
}

// destinationKilled checks what is left of the two sides.
func (m *faultMover) destinationKilled(there *proc, exit int) string {
	m.t.Helper()
	if exit == 0 { // it had answered before: the guest was killed with it
		m.proc.wait()
		m.at = 1 - m.at
		m.files(true)
		checkImage(m.t, m.image(), movedDisk/mempage.Size)
		m.start()
		return "killed there"
	}
	if m.h.info(m.name).State != "handoff-unknown" {
		m.goesOnHere(there, "running")
		return "here"
	}
	// It may have got the right to run, and then its copy has a name and is whole. An
	// operator who knows that it is dead takes the guest back.
	if _, err := os.Stat(m.copied()); err == nil && !m.isMovedCopy() {
		checkImage(m.t, m.copied(), movedDisk/mempage.Size)
		if err := os.Remove(m.copied()); err != nil {
			m.t.Fatal(err)
		}
	}
	m.h.must("resume", m.name, "--force")
	awaitDisk(m.t, m.proc.out, m.proc.out.len(), movedDisk/mempage.Size)
	m.files(false)
	return "here by force"
}

// sourceKilled checks what is left when the source is dead.
func (m *faultMover) sourceKilled(there *proc, name string) string {
	m.t.Helper()
	i := there.err.await(m.t, 0, "a word of the destination", func(s string) bool {
		return strings.Contains(s, "still listening") || strings.Contains(s, "the guest runs here now")
	})
	if strings.Contains(there.err.snapshot()[i], "the guest runs here now") {
		m.goesOnThere(there, name)
		return "there"
	}
	there.kill(syscall.SIGKILL)
	there.wait()
	if there.out.len() > 0 {
		m.t.Errorf("the guest ran at the destination: %q", there.out.tail(3))
	}
	m.files(false)
	checkImage(m.t, m.image(), movedDisk/mempage.Size)
	m.start()
	return "killed here"
}

// copied is where the guest's disk comes to.
func (m *faultMover) copied() string { return filepath.Join(m.dirs[1-m.at], "disk.img") }

// isMovedCopy reports whether what is there is a disk that the guest has left behind.
func (m *faultMover) isMovedCopy() bool {
	_, err := unix.Getxattr(m.copied(), "user.govmm.moved", nil)
	return err == nil
}

// files checks that the directories have disks of that name and nothing else, and that the
// one that the guest is not at is marked as left behind.
func (m *faultMover) files(arrived bool) {
	m.t.Helper()
	for i, dir := range m.dirs {
		list, err := os.ReadDir(dir)
		if err != nil {
			m.t.Fatal(err)
		}
		for _, f := range list {
			if f.Name() != "disk.img" {
				m.t.Errorf("%s is left in %s", f.Name(), dir)
			}
		}
		if i == m.at && len(list) != 1 {
			m.t.Errorf("%s has %d files", dir, len(list))
		}
	}
	_, err := os.Stat(m.copied())
	if arrived && err != nil || err == nil && !m.isMovedCopy() || err != nil && !errors.Is(err, os.ErrNotExist) {
		m.t.Errorf("%s: %v, left behind: %v", m.copied(), err, m.isMovedCopy())
	}
}

// TestDiskFasterThanTheLink: a guest writes its disk faster than the link. The migration says
// why it cannot end; with --auto-converge the guest is slowed down until it can.
func TestDiskFasterThanTheLink(t *testing.T) {
	needKVM(t)
	const disk = 2 * mib
	h := newHost(t)
	here := h.start("run", "a", "--memory", "64M", "--disk", newImage(t, disk), "--cmdline", "fill=8M dirty=1M rate=50 verify=1 tick=0.3 disk=2M drate=0")
	awaitDisk(t, here.out, 0, disk/mempage.Size)
	first, at := here.out.awaitTick(t, here.out.len(), "any", func(tick) bool { return true })
	last, _ := here.out.awaitTick(t, at, "a second later", func(k tick) bool { return k.up > first.up+1 })
	speed := float64(last.more["dwrites"]-first.more["dwrites"]) * mempage.Size / (last.up - first.up)
	link := min(4*mib, int(speed/4)) // so that the disk takes half a second or more
	there, addr := h.receive("b", "--disk-dir", t.TempDir())
	slow := []string{"a", "--to", addr, "--copy-disks", "--downtime-limit", "50ms", "--bandwidth-limit", fmt.Sprintf("%dK", link>>10)}
	r, exit := h.migrate(append(slow, "--max-rounds", "3")...)
	if exit == 0 || !strings.Contains(r.Error, "MiB of its disks are left, to which it writes faster than they can be copied") {
		t.Errorf("exit %d, %+v; expected was one that names the disks", exit, r)
	}
	awaitDisk(t, here.out, here.out.len(), disk/mempage.Size)
	r, exit = h.migrate(append(slow, "--auto-converge", "--timeout", "10m")...)
	if exit != 0 || r.ThrottlePercent == 0 {
		t.Errorf("with --auto-converge: exit %d, %+v", exit, r)
	}
	t.Logf("the guest writes %.0f MB/s, the link %d KiB/s: with --auto-converge %d ms, %d rounds, slowed down by %d%%", speed/1e6, link>>10, r.TotalMS, len(r.Rounds), r.ThrottlePercent)
	awaitDisk(t, there.out, 0, disk/mempage.Size)
}
