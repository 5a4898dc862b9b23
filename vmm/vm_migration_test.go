package vmm

import (
	"errors"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
	"golang.org/x/sys/unix"
)

// receiving starts a VM that waits for a guest. It trusts whoever sends it.
func receiving(t *testing.T, cfg ReceiveConfig) *ran {
	t.Helper()
	con := vmtest.NewTape()
	cfg.Listener, cfg.Serial, cfg.Log, cfg.AllowSourcePaths = listen(t), con, vmtest.Log(t), true
	vm, err := NewReceiver(cfg)
	check(t, err)
	r := run(t, vm, con)
	r.is(t, StateReceiving)
	if i := r.Info(); i.Address != r.Addr().String() || i.CPUs != 0 {
		t.Errorf("info of a receiver that waits: %+v", i)
	}
	return r
}

// migrateTo migrates a guest and returns the result.
func (r *ran) migrateTo(t *testing.T, addr string) migrate.Result {
	t.Helper()
	m, err := r.StartMigration(addr, migrate.Options{VerifyPages: true, DowntimeLimit: patience})
	check(t, err)
	return result(t, m)
}

func result(t *testing.T, m *migrate.Migration) migrate.Result {
	t.Helper()
	select {
	case <-m.Done():
	case <-vmtest.Within(t).Done():
		t.Fatalf("the migration does not end: %+v", m.Progress())
	}
	return m.Result()
}

// TestVMMigrates migrates a guest three times, each time to a new VM. The guest does
// what is typed all the time.
func TestVMMigrates(t *testing.T) {
	vm := obeying(t)
	for range 3 {
		next := receiving(t, ReceiveConfig{Name: "next"})
		vm.con.Type("x")
		vm.con.Await(t, "Bx")
		if r := vm.migrateTo(t, next.Addr().String()); r.Status != "completed" {
			t.Fatalf("%+v", r)
		}
		next.is(t, StateRunning)
		vm.ends(t, Migrated, "the guest runs at "+next.Addr().String()+" now")
		vm.is(t, StateMigrated)
		refused(t, vm.Resume(t.Context(), true), "the guest runs at "+next.Addr().String())
		refused(t, vm.Pause(t.Context()), "moved away")
		if i := next.Info(); i.Name != "next" || i.CPUs != 2 || i.Memory != 16<<20 || i.Address != "" || i.Incoming != nil {
			t.Errorf("info of a VM that was received: %+v", i)
		}
		vm = next
		vm.con.Write([]byte("B"))
	}
	vm.con.Type("y")
	vm.con.Await(t, "By")
	vm.con.Type("r") // the kernel has travelled with it
	vm.con.Await(t, "ByB")
	vm.con.Type("p")
	vm.ends(t, PoweredOff, "")
}

// TestPausedArrivesPaused: a paused guest arrives paused, with the input that it has
// not read.
func TestPausedArrivesPaused(t *testing.T) {
	vm := obeying(t)
	check(t, vm.Pause(t.Context()))
	vm.con.Type("abcdef") // the guest prints each of them
	for deadline := vmtest.Within(t); vm.con.Unread() > 0; time.Sleep(time.Millisecond) {
		check(t, deadline.Err())
	}
	next := receiving(t, ReceiveConfig{})
	if r := vm.migrateTo(t, next.Addr().String()); r.Status != "completed" {
		t.Fatalf("%+v", r)
	}
	next.is(t, StatePaused)
	if got := next.Info().Name; got != "test" {
		t.Errorf("name %q", got)
	}
	next.con.Type("x")
	check(t, next.Resume(t.Context(), false))
	next.con.Await(t, "abcdefx")
}

// TestDemoGuestMigrates migrates the demo guest twice while it rewrites memory on two
// vCPUs as fast as it can. The guest checks all of its pages, and both sides compare
// their hashes.
func TestDemoGuestMigrates(t *testing.T) {
	needKVM(t)
	start := func(vm *VM, con *vmtest.Tape, err error) *ran {
		t.Helper()
		check(t, err)
		return run(t, vm, con)
	}
	con := vmtest.NewTape()
	vm, err := NewVM(Config{CPUs: 2, Memory: 64 << 20, Serial: con, Log: vmtest.Log(t), Cmdline: "fill=32M dirty=4M rate=0 verify=1 tick=1"})
	r := start(vm, con, err)
	for range 2 {
		con.AwaitPart(t, "tick")
		con.AwaitPart(t, " bad=0 ")
		next := receiving(t, ReceiveConfig{})
		if res := r.migrateTo(t, next.Addr().String()); res.Status != "completed" {
			t.Fatalf("%+v", res)
		}
		r.ends(t, Migrated, "")
		r, con = next, next.con
	}
	con.AwaitPart(t, "tick")
	con.AwaitPart(t, " bad=0 ")
	con.Type("poweroff\n")
	r.ends(t, PoweredOff, "")
	if strings.Contains(con.Text(), "bad page") {
		t.Error(con.Text())
	}
}

// takeHugePages leaves no huge page for others until the test ends.
func takeHugePages(t *testing.T) {
	t.Helper()
	info, err := os.ReadFile("/proc/meminfo")
	check(t, err)
	number := func(key string) (n int) {
		if m := regexp.MustCompile(`(?m)^` + key + `:\s+(\d+)`).FindSubmatch(info); m != nil {
			n, err = strconv.Atoi(string(m[1]))
			check(t, err)
		}
		return n
	}
	if n := (number("HugePages_Free") - number("HugePages_Rsvd")) * number("Hugepagesize") << 10; n > 0 {
		b, err := unix.Mmap(-1, 0, n, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_HUGETLB)
		check(t, err)
		t.Cleanup(func() { check(t, unix.Munmap(b)) })
	}
}

// TestRefusedGuestGoesOn: the destination has not got the memory, and the guest goes
// on at the source.
func TestRefusedGuestGoesOn(t *testing.T) {
	takeHugePages(t)
	vm := obeying(t)
	next := receiving(t, ReceiveConfig{Backing: memory.Hugetlb})
	r := vm.migrateTo(t, next.Addr().String())
	if r.Status != "failed" || !strings.Contains(r.Error, "memory of 16 MiB (hugetlb): this host has too little") {
		t.Fatalf("%+v", r)
	}
	for deadline := vmtest.Within(t); next.Info().Incoming != nil; time.Sleep(time.Millisecond) {
		check(t, deadline.Err()) // the connection is still being closed
	}
	next.is(t, StateReceiving)
	if i := next.Info(); i.CPUs != 0 {
		t.Errorf("%+v", i)
	}
	vm.is(t, StateRunning)
	vm.con.Type("x")
	vm.con.Await(t, "Bx")
	check(t, next.Stop(vmtest.Within(t)))
	next.ends(t, Stopped, "no guest has arrived")
}

// TestMigrationRefused: StartMigration reports a request that makes no sense.
func TestMigrationRefused(t *testing.T) {
	vm := obeying(t)
	if _, err := vm.StartMigration("nowhere", migrate.Options{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("no port: %v", err)
	}
	if _, err := vm.StartMigration("127.0.0.1:1", migrate.Options{MaxRounds: -1}); !errors.Is(err, ErrInvalid) {
		t.Errorf("negative rounds: %v", err)
	}
	next := receiving(t, ReceiveConfig{})
	refused(t, next.Pause(t.Context()), "no guest has arrived yet")
	refused(t, next.Resume(t.Context(), true), "no guest has arrived yet")
	_, err := next.StartMigration("127.0.0.1:1", migrate.Options{})
	refused(t, err, "no guest has arrived yet")
}

// stuck returns the address of a peer that accepts connections and never answers.
func stuck(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	var conns sync.WaitGroup
	t.Cleanup(func() {
		ln.Close()
		conns.Wait()
	})
	conns.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				_, _ = io.Copy(io.Discard, c)
			})
		}
	})
	return ln.Addr().String()
}

// TestDuringMigration: what a user and the guest may do while a migration is
// under way.
func TestDuringMigration(t *testing.T) {
	start := func(t *testing.T) (*ran, *migrate.Migration) {
		vm := obeying(t)
		m, err := vm.StartMigration(stuck(t), migrate.Options{})
		check(t, err)
		vm.is(t, StateMigrating)
		return vm, m
	}
	t.Run("a second one", func(t *testing.T) {
		vm, m := start(t)
		_, err := vm.StartMigration("127.0.0.1:1", migrate.Options{})
		refused(t, err, "a migration to 127.0.0.1:")
		if vm.Migration() != m || vm.Info().Migration == nil {
			t.Error("Migration or Info does not have the migration that is under way")
		}
	})
	t.Run("pause, resume, cancel", func(t *testing.T) {
		vm, m := start(t)
		check(t, vm.Pause(t.Context()))
		vm.is(t, StateMigrating)
		check(t, vm.Resume(t.Context(), false))
		check(t, vm.Pause(t.Context()))
		check(t, m.Cancel())
		if r := result(t, m); r.Status != "cancelled" {
			t.Errorf("%+v", r)
		}
		<-vm.lastMigration().settled
		vm.is(t, StatePaused)
		check(t, vm.Resume(t.Context(), false))
		vm.con.Type("x")
		vm.con.Await(t, "Bx")
	})
	t.Run("stop", func(t *testing.T) {
		vm, m := start(t)
		check(t, vm.Stop(vmtest.Within(t)))
		vm.ends(t, Stopped, "stopped")
		if r := result(t, m); r.Status != "cancelled" {
			t.Errorf("%+v", r)
		}
	})
	t.Run("power off", func(t *testing.T) {
		vm, m := start(t)
		vm.con.Type("p")
		vm.ends(t, PoweredOff, "")
		if r := result(t, m); r.Status != "failed" || !strings.Contains(r.Error, "the guest powered off") {
			t.Errorf("%+v", r)
		}
	})
	t.Run("reset", func(t *testing.T) {
		vm, m := start(t)
		vm.con.Type("r")
		vm.con.Await(t, "BB")
		vm.con.Type("xt")
		vm.con.Await(t, "BBxB")
		vm.is(t, StateMigrating)
		check(t, m.Cancel())
		if r := result(t, m); r.Status != "cancelled" || r.GuestResets != 2 {
			t.Errorf("%+v", r)
		}
	})
}

// cutAtRunning forwards connections to a receiver. It closes the connection on which
// the receiver says that the guest runs, and each later one until set(false).
type cutAtRunning struct {
	ln    net.Listener
	to    string
	conns sync.WaitGroup

	cutMu sync.Mutex // guards cut
	cut   bool
}

func newCut(t *testing.T, to string) *cutAtRunning {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	p := &cutAtRunning{ln: ln, to: to}
	t.Cleanup(func() {
		ln.Close()
		p.conns.Wait()
	})
	p.conns.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			p.conns.Go(func() { p.forward(c) })
		}
	})
	return p
}

func (p *cutAtRunning) isCut() bool {
	p.cutMu.Lock()
	defer p.cutMu.Unlock()
	return p.cut
}

func (p *cutAtRunning) set(cut bool) {
	p.cutMu.Lock()
	defer p.cutMu.Unlock()
	p.cut = cut
}

// forward copies in both directions. The destination's frames are a header of 24 bytes,
// the type first, the payload's length in bytes 4 to 7 (docs/migration.md).
func (p *cutAtRunning) forward(c net.Conn) {
	defer c.Close()
	if p.isCut() {
		return
	}
	d, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	defer d.Close()
	p.conns.Go(func() {
		defer d.Close()
		_, _ = io.Copy(d, c)
	})
	const running = 68
	for {
		var h [24]byte
		if _, err := io.ReadFull(d, h[:]); err != nil {
			return
		}
		if h[0] == running {
			p.set(true)
			return
		}
		length := int64(h[4]) | int64(h[5])<<8 | int64(h[6])<<16 | int64(h[7])<<24
		if _, err := c.Write(h[:]); err != nil {
			return
		}
		if _, err := io.CopyN(c, d, length); err != nil {
			return
		}
	}
}

// unknownHandoff brings a migration to where the destination runs the guest and
// the source cannot know.
func unknownHandoff(t *testing.T) (src, dst *ran, m *migrate.Migration, p *cutAtRunning) {
	t.Helper()
	src = obeying(t)
	dst = receiving(t, ReceiveConfig{})
	p = newCut(t, dst.Addr().String())
	m, err := src.StartMigration(p.ln.Addr().String(), migrate.Options{DowntimeLimit: patience})
	check(t, err)
	for deadline := vmtest.Within(t); src.Info().State != StateHandoffUnknown; time.Sleep(time.Millisecond) {
		if deadline.Err() != nil {
			t.Fatalf("%+v", m.Progress())
		}
	}
	dst.is(t, StateRunning)
	refused(t, src.Resume(t.Context(), false), "the guest may run elsewhere: resume it at 127.0.0.1:")
	refused(t, src.Pause(t.Context()), "handed over")
	if err := m.Cancel(); !errors.Is(err, migrate.ErrTooLate) {
		t.Errorf("cancelled after COMMIT: %v", err)
	}
	return src, dst, m, p
}

func TestHandoffUnknown(t *testing.T) {
	t.Run("learnt", func(t *testing.T) {
		src, dst, m, p := unknownHandoff(t)
		p.set(false)
		if r := result(t, m); r.Status != "completed" {
			t.Errorf("%+v", r)
		}
		src.ends(t, Migrated, "")
		dst.con.Type("x")
		dst.con.Await(t, "x")
		if got := src.con.Text(); got != "B" {
			t.Errorf("the source's guest wrote %q", got)
		}
	})
	t.Run("forced", func(t *testing.T) {
		src, _, m, _ := unknownHandoff(t)
		check(t, src.Resume(t.Context(), true))
		if r := result(t, m); r.Status != "failed" {
			t.Errorf("%+v", r)
		}
		src.is(t, StateRunning)
		src.con.Type("x")
		src.con.Await(t, "Bx")
		check(t, src.Pause(t.Context()))
		check(t, src.Resume(t.Context(), false))
		next := receiving(t, ReceiveConfig{}) // the guest can be migrated again
		if r := src.migrateTo(t, next.Addr().String()); r.Status != "completed" {
			t.Errorf("%+v", r)
		}
	})
	t.Run("forced too late", func(t *testing.T) {
		src, dst, m, p := unknownHandoff(t)
		p.set(false)
		result(t, m)
		refused(t, src.Resume(t.Context(), true), "127.0.0.1:")
		dst.is(t, StateRunning)
	})
	t.Run("stopped", func(t *testing.T) {
		src, dst, _, _ := unknownHandoff(t)
		check(t, src.Stop(vmtest.Within(t)))
		src.ends(t, Stopped, "it is not known whether the guest runs at 127.0.0.1:")
		dst.is(t, StateRunning)
	})
}

// TestLeftBeforeSettled: the guest has left, and the migration takes a moment to end.
// The outcome is Migrated, not Stopped.
func TestLeftBeforeSettled(t *testing.T) {
	needKVM(t)
	spec, err := testConfig(1, vmtest.JustCount).spec()
	check(t, err)
	m, err := machine.New(spec, machine.Ends{}, vmtest.Log(t))
	check(t, err)
	t.Cleanup(func() { check(t, m.Close()) })
	v := newVM("test", nil, nil, vmtest.Log(t))
	o := &outgoing{addr: "elsewhere", settled: make(chan struct{})}
	v.machine, v.outgoing = m, o
	close(v.left)
	time.AfterFunc(300*time.Millisecond, func() { close(o.settled) })
	out, again, err := v.watch(t.Context())
	check(t, err)
	if out.Kind != Migrated || again {
		t.Errorf("the VM %v: %s", out.Kind, out.Text)
	}
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	v.life = lifeRunning
	if err := v.migratable(); !errors.Is(err, ErrState) {
		t.Errorf("a guest that has moved away can be moved: %v", err)
	}
}
