package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// take locks an image as another process would, and returns a function that unlocks
// it. The lock is F_OFD_SETLK of fcntl(2), like QEMU's and ours.
func take(image string) (giveUp func() error, err error) {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", image, err)
	}
	return f.Close, nil
}

// takeAt takes an image when a frame of the proxy's migration arrives, before the
// proxy passes it on.
type takeAt struct {
	image  string
	typ    byte
	mu     sync.Mutex // guards all below
	giveUp func() error
	err    error
	came   bool
}

func (k *takeAt) hook(_ bool, typ byte, _ uint64) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if typ == k.typ && !k.came {
		k.came = true
		k.giveUp, k.err = take(k.image)
	}
	return true
}

// free unlocks the image, which must have been taken.
func (k *takeAt) free(t testing.TB) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.came || k.err != nil {
		t.Fatalf("the image was not taken: frame %d came: %v, %v", k.typ, k.came, k.err)
	}
	if err := k.giveUp(); err != nil {
		t.Fatal(err)
	}
}

// TestDiskTakenAfterPrepared: another process takes the destination's disk after
// PREPARED, so only the start of the guest can notice. The guest goes on at the source,
// with its disk's lock, and moves when the disk is free again.
func TestDiskTakenAfterPrepared(t *testing.T) {
	needKVM(t)
	for _, m := range []struct {
		name string
		typ  byte
	}{{"PREPARED", framePrepared}, {"COMMIT", frameCommit}} {
		t.Run(m.name, func(t *testing.T) {
			h := newHost(t)
			image, elsewhere := newImage(t, 4*mib), newImage(t, 4*mib)
			here := h.start("run", "here", "--memory", "64M", "--disk", image, "--cmdline",
				"fill=8M dirty=2M rate=50 verify=1 tick=0.5 disk=2M drate=0")
			awaitDisk(t, here.out, 0, 2*mib/mempage.Size)
			h.must("pause", "here")
			copyImage(t, image, elsewhere) // or it would not be taken for the guest's
			there, addr := h.receive("there", "--disk", elsewhere)
			third := &takeAt{image: elsewhere, typ: m.typ}
			proxy := newWireProxy(t, addr, third.hook)
			r, exit := h.migrate("here", "--to", proxy.addr, "--downtime-limit", "3s")
			if exit < 3 || r.Status != "failed" || !strings.Contains(r.Error, "start the guest; see the destination's log") {
				t.Fatalf("exit %d, %+v; expected an error that names the step", exit, r)
			}
			there.err.await(t, 0, "the disk's name", func(line string) bool {
				return strings.Contains(line, elsewhere) && strings.Contains(line, "another process or disk uses it")
			})
			if s := h.info("here").State; s != "paused" {
				t.Errorf("the source is %q", s)
			}
			h.must("resume", "here")
			if !locks(here.cmd.Process.Pid, image) {
				t.Error("the guest that stayed has lost its disk's lock")
			}
			awaitDisk(t, here.out, here.out.len(), 2*mib/mempage.Size)
			if there.out.len() != 0 {
				t.Errorf("the guest ran at the destination: %q", there.out.tail(3))
			}
			third.free(t)
			h.must("pause", "here")
			copyImage(t, image, elsewhere)
			if r, exit := h.migrate("here", "--to", addr, "--downtime-limit", "3s"); exit != 0 || r.Status != "completed" {
				t.Fatalf("with the disk free: exit %d, %+v", exit, r)
			}
			h.must("resume", "there")
			awaitDisk(t, there.out, 0, 2*mib/mempage.Size)
			if !locks(there.cmd.Process.Pid, elsewhere) {
				t.Error("the guest runs without its disk's lock")
			}
		})
	}
}

// copyImage copies the image of a paused guest from a to b.
func copyImage(t testing.TB, a, b string) {
	t.Helper()
	content, err := os.ReadFile(a)
	if err == nil {
		err = os.WriteFile(b, content, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestSharedDiskTakenInBetween: another process takes the disk that both sides share at
// the moment when neither has its lock. Neither side then runs the guest, which would
// write to a disk that another process writes to. When the disk is free, resume is
// enough.
func TestSharedDiskTakenInBetween(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	image := newImage(t, 4*mib)
	here := h.start("run", "here", "--memory", "64M", "--disk", image, "--cmdline",
		"fill=8M dirty=2M rate=50 verify=1 tick=0.5 disk=2M drate=0")
	awaitDisk(t, here.out, 0, 2*mib/mempage.Size)
	there, addr := h.receive("there", "--disk", image)
	third := &takeAt{image: image, typ: frameCommit}
	r, exit := h.migrate("here", "--to", newWireProxy(t, addr, third.hook).addr, "--downtime-limit", "3s")
	if exit < 3 || r.Status != "failed" || !strings.Contains(r.Error, image) {
		t.Fatalf("exit %d, %+v; expected an error that names the disk", exit, r)
	}
	if s := h.info("here").State; s != "paused" {
		t.Errorf("the source, whose disk another has, is %q", s)
	}
	if _, errs, exit := h.run("resume", "here"); exit != 1 || !strings.Contains(errs, image) {
		t.Errorf("resume without the disk: exit %d, %q", exit, errs)
	}
	if there.out.len() != 0 {
		t.Errorf("the guest ran at the destination: %q", there.out.tail(3))
	}
	third.free(t)
	from := here.out.len()
	h.must("resume", "here")
	if !locks(here.cmd.Process.Pid, image) {
		t.Error("the guest runs without its disk's lock")
	}
	awaitDisk(t, here.out, from, 2*mib/mempage.Size)
}

// TestTapTakenAtTheDestination: a tap that another process has attached at the
// destination is named before READY, together with all else that is wrong there: to the
// source by its own names, in the log by those of the destination.
func TestTapTakenAtTheDestination(t *testing.T) {
	needKVM(t)
	needRoot(t)
	h := newHost(t)
	name := func(what string) string { return fmt.Sprintf("gv%s%d", what, os.Getpid()%1e6) }
	busy, own := name("b"), name("o")
	h.start("run", "other", "--memory", "64M", "--net", "tap="+busy, "--cmdline", "tick=1").out.awaitText(t, 0, "tick 1 ")
	image := newImage(t, mib)
	here := h.start("run", "here", "--memory", "64M", "--disk", image, "--net", "tap="+own+",mac=52:54:00:00:00:07", "--cmdline", "fill=8M tick=0.5")
	here.out.awaitText(t, 0, "tick 1 ")
	gone := filepath.Join(t.TempDir(), "gone.img")
	there, addr := h.receive("there", "--net", "tap="+busy, "--disk", gone)
	var mu sync.Mutex
	var ready bool
	proxy := newWireProxy(t, addr, func(toSource bool, typ byte, _ uint64) bool {
		mu.Lock()
		defer mu.Unlock()
		ready = ready || toSource && typ == frameReady || !toSource && typ == framePages
		return true
	})
	r, exit := h.migrate("here", "--to", proxy.addr, "--downtime-limit", "3s")
	if exit < 3 || r.Status != "failed" {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	at := there.err.awaitText(t, 0, "migration failed")
	log := there.err.snapshot()[at]
	for _, c := range []struct {
		where, text string
		says        []string
	}{
		{"the error", r.Error, []string{"disk " + image + ": this host cannot open", "net 52:54:00:00:00:07: this host cannot open"}},
		{"the destination's log", log, []string{"tap " + busy, "another process uses it", gone}},
	} {
		for _, says := range c.says {
			if !strings.Contains(c.text, says) {
				t.Errorf("%s is %q, without %q", c.where, c.text, says)
			}
		}
	}
	if strings.Contains(r.Error, busy) || strings.Contains(r.Error, gone) {
		t.Errorf("the error names what the source did not: %q", r.Error)
	}
	mu.Lock()
	if ready {
		t.Error("the destination refused after READY")
	}
	mu.Unlock()
	here.out.awaitTick(t, here.out.len(), "at the source", func(tick) bool { return true })
}
