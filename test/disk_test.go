package test

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// newImage makes a disk image of zeros.
func newImage(t testing.TB, bytes int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	if err == nil {
		err = f.Truncate(bytes)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// locks reports whether a process has locked an image for writing.
func locks(pid int, image string) bool {
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return false // it has ended
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name())); err != nil || to != image {
			continue
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd.Name()))
		if err != nil {
			continue
		}
		for s := bufio.NewScanner(strings.NewReader(string(text))); s.Scan(); {
			if w := strings.Fields(s.Text()); len(w) > 4 && w[0] == "lock:" && w[2] == "OFDLCK" && w[4] == "WRITE" {
				return true
			}
		}
	}
	return false
}

// watchLocks watches which of two processes has the image's lock, until stop is
// called. stop returns how often both had it, which must be never, and how often
// one had it.
func watchLocks(image string, a, b int) (stop func() (both, one int)) {
	done := make(chan struct{})
	var watcher sync.WaitGroup
	var both, one int
	watcher.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			inA, inB := locks(a, image), locks(b, image)
			if inA || inB {
				one++
			}
			// The lock may have moved between the two looks.
			if inA && inB && locks(a, image) {
				both++
			}
			time.Sleep(time.Millisecond)
		}
	})
	return func() (int, int) {
		close(done)
		watcher.Wait()
		return both, one
	}
}

// awaitDisk waits until the guest, since line from, has written its whole disk and
// read it back, twice. The guest must not find an error.
func awaitDisk(t testing.TB, l *lines, from int, pages uint64) {
	t.Helper()
	first, next := l.awaitTick(t, from, "any", func(tick) bool { return true })
	l.awaitTick(t, next, "the disk written and read", func(k tick) bool {
		if k.more["dbad"] != 0 {
			t.Fatalf("the disk: %+v", k)
		}
		return k.more["dwrites"] >= first.more["dwrites"]+2*pages && k.more["dreads"] >= first.more["dreads"]+2*pages
	})
}

// TestDiskMoves: a guest writes, flushes, reads and checks a disk flat out while it
// moves there and back. Only the process that runs it holds the disk's lock. In the
// end the disk has what the guest wrote.
func TestDiskMoves(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const size = 2 * mib
	image := newImage(t, 3*size)
	here := h.start("run", "d0", "--memory", "64M", "--disk", image, "--cmdline",
		"fill=8M dirty=2M rate=50 verify=1 tick=0.5 disk=2M drate=0")
	awaitDisk(t, here.out, 0, size/mempage.Size)
	for i := range count(2, 10) {
		there, addr := h.receive(fmt.Sprintf("d%d", i+1), "--disk", image)
		stop := watchLocks(image, here.cmd.Process.Pid, there.cmd.Process.Pid)
		r, exit := h.migrate(fmt.Sprintf("d%d", i), "--to", addr, "--downtime-limit", "3s")
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, r)
		}
		awaitDisk(t, there.out, 0, size/mempage.Size)
		both, one := stop()
		if both != 0 || one == 0 {
			t.Errorf("of %d looks at the disk's lock %d found it held by both", one, both)
		}
		if !locks(there.cmd.Process.Pid, image) {
			t.Error("the guest runs without the disk's lock")
		}
		if _, errs, exit := h.run("run", "other", "--disk", image); exit == 0 || !strings.Contains(errs, "lock") {
			t.Errorf("another VM with the same disk: exit %d, %q", exit, errs)
		}
		awaitIRQs(t, there.out)
		here = there
	}
	h.must("stop", "--force", fmt.Sprintf("d%d", count(2, 10)))
	here.wait()
	checkImage(t, image, size/mempage.Size)
}

// awaitIRQs waits until the guest has counted an interrupt of a device since its
// first tick. Without interrupts it would still find its answers, but late.
func awaitIRQs(t testing.TB, l *lines) {
	t.Helper()
	first, next := l.awaitTick(t, 0, "any", func(tick) bool { return true })
	l.awaitTick(t, next, "an interrupt of a device", func(k tick) bool { return k.more["irqs"] > first.more["irqs"] })
}

// checkImage reads the image: each page is the guest's, of its last round or of the
// one before. From the first page on the round only falls, except for the few requests
// that were in flight.
func checkImage(t testing.TB, image string, pages int) {
	t.Helper()
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	const inFlight = 4 * 16
	word := func(page, i int) uint64 { return binary.LittleEndian.Uint64(b[page*mempage.Size+8*i:]) }
	newest := word(0, 1)
	old := 0
	for i := range pages {
		if want := uint64(0x6776)<<48 | 1<<31 | uint64(i); word(i, 0) != want {
			t.Fatalf("disk page %d begins with %#x, not with %#x", i, word(i, 0), want)
		}
		switch round := word(i, 1); {
		case round == newest && old > inFlight:
			t.Errorf("disk page %d is of round %d, after %d pages of the round before", i, round, old)
		case round == newest:
		case round+1 == newest:
			old++
		default:
			t.Fatalf("disk page %d is of round %d, the first of round %d", i, round, newest)
		}
	}
	for i, v := range b[pages*mempage.Size:] {
		if v != 0 {
			t.Fatalf("byte %d, past what the guest writes, is %#x", pages*mempage.Size+i, v)
		}
	}
}

// TestSlowFlush: what a stop took is what the guest saw of it, also with storage whose
// flush takes long. The guest goes on while its disk is flushed before the stop.
func TestSlowFlush(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	image := newImage(t, 4*mib)
	const flush = 700 // milliseconds
	here := h.start("run", "here", "--memory", "64M", "--disk", image, "--slow-flush", fmt.Sprintf("%dms", flush),
		"--cmdline", "fill=8M dirty=1M rate=2000 verify=1 tick=0.5 disk=2M drate=20")
	here.out.awaitTick(t, 0, "the disk written", func(k tick) bool { return k.more["dwrites"] > 0 })
	there, addr := h.receive("there", "--disk", image)
	r, exit := h.migrate("here", "--to", addr, "--downtime-limit", "10s")
	if exit != 0 || r.Status != "completed" {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	if r.TotalMS < flush {
		t.Errorf("the migration took %d ms, and its disk one of %d to flush", r.TotalMS, flush)
	}
	k, _ := there.out.awaitTick(t, 0, "at the destination", func(tick) bool { return true })
	// While a vCPU is being stopped the guest may run, which takes as long as the host is busy.
	if pause := r.Downtime["pause_ms"]; r.DowntimeMS-pause > k.gap+1 || pause >= flush {
		t.Errorf("a downtime of %.1f ms (%.1f until all stood still), of which the guest saw %.1f", r.DowntimeMS, r.Downtime["pause_ms"], k.gap)
	}
}

// TestDiskTakenAtTheDestination: if another VM has the disk at the destination, the
// guest stays where it is, with its lock.
func TestDiskTakenAtTheDestination(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	image, taken := newImage(t, 4*mib), newImage(t, 4*mib)
	h.start("run", "other", "--memory", "64M", "--disk", taken, "--cmdline", "tick=1").out.awaitText(t, 0, "tick 1 ")
	here := h.start("run", "here", "--memory", "64M", "--disk", image, "--cmdline",
		"fill=8M dirty=2M rate=50 verify=1 tick=0.5 disk=2M drate=0")
	awaitDisk(t, here.out, 0, 2*mib/mempage.Size)
	there, addr := h.receive("there", "--disk", taken)
	r, exit := h.migrate("here", "--to", addr, "--downtime-limit", "3s")
	if exit < 3 || r.Status != "failed" || !strings.Contains(r.Error, "disk "+image+": this host has other bytes") || strings.Contains(r.Error, taken) {
		t.Fatalf("exit %d, %+v; expected was one that names the disk, as the source knows it", exit, r)
	}
	there.err.awaitText(t, 0, taken+": lock: another process or disk uses it")
	if !locks(here.cmd.Process.Pid, image) {
		t.Error("the guest that stayed has lost its disk's lock")
	}
	awaitDisk(t, here.out, here.out.len(), 2*mib/mempage.Size)
}
