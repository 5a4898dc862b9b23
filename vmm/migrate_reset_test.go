package vmm

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/machine"
)

// noiseAt is where full puts what is not of the guest's kernel.
const noiseAt, noise = 8 << 20, 4 << 20

// full starts a guest that obeys and has memory to send.
func full(t *testing.T, cfg Config) *ran {
	t.Helper()
	vm := running(t, cfg, "B")
	content := make([]byte, noise)
	_, _ = rand.NewChaCha8([32]byte{}).Read(content)
	check(t, vm.current().Memory().WriteAt(content, noiseAt))
	return vm
}

// inPrecopy starts a migration that would take long, and returns when pages are being
// sent.
func (r *ran) inPrecopy(t *testing.T, addr string, opt migrate.Options) *migrate.Migration {
	t.Helper()
	opt.BandwidthLimit = migrate.MinBandwidthLimit
	m, err := r.StartMigration(addr, opt)
	check(t, err)
	for deadline := vmtest.Within(t); m.Progress().Phase != migrate.PhasePrecopy || m.Progress().BytesSent == 0; time.Sleep(time.Millisecond) {
		check(t, deadline.Err())
	}
	return m
}

// TestResetInPrecopy: the guest's reset is made where it then has the right to run, its
// memory is not sent any more, and it arrives as after any reset.
func TestResetInPrecopy(t *testing.T) {
	for name, c := range map[string]struct {
		key string
		cfg func(*Config)
		opt migrate.Options
	}{
		"plain":        {key: "r"},
		"triple fault": {key: "t"},
		"verified":     {key: "k", opt: migrate.Options{VerifyPages: true}},
		"compressed":   {key: "r", opt: migrate.Options{Compression: migrate.CompressLZ4, Channels: 3}},
		"slowed down":  {key: "r", opt: migrate.Options{AutoConverge: true}},
		"ring":         {key: "r", cfg: func(c *Config) { c.Tracking = machine.TrackRing }},
		"disk": {key: "r", cfg: func(c *Config) {
			c.Devices = []virtio.Spec{disk(vmtest.Image(t, "a.img", 1<<20))}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(2, vmtest.Obey)
			if c.cfg != nil {
				c.cfg(&cfg)
			}
			vm := full(t, cfg)
			next := receiving(t, ReceiveConfig{})
			m := vm.inPrecopy(t, next.Addr().String(), c.opt)
			vm.con.Type(c.key)
			r := result(t, m)
			if r.Status != "completed" || r.GuestResets != 1 || r.PagesSent >= noise>>12 || r.BytesSent >= noise {
				t.Errorf("%+v", r)
			}
			vm.ends(t, Migrated, "")
			next.con.Await(t, "B")
			next.con.Type("x")
			next.con.Await(t, "Bx")
			left := make([]byte, noise)
			check(t, next.current().Memory().ReadAt(left, noiseAt))
			if strings.Trim(string(left), "\x00") != "" {
				t.Error("the guest has memory of the one before")
			}
			if text := vm.con.Text(); text != "B" {
				t.Errorf("the source printed %q", text)
			}
			next.con.Type("r")
			next.con.Await(t, "BxB")
			last := receiving(t, ReceiveConfig{})
			if r := next.migrateTo(t, last.Addr().String()); r.Status != "completed" || r.GuestResets != 0 {
				t.Errorf("the next migration: %+v", r)
			}
		})
	}
}

// TestARebootLoopIsMoved: a guest that does nothing but reset itself is moved from host
// to host.
func TestARebootLoopIsMoved(t *testing.T) {
	cfg := testConfig(1, faulty)
	cfg.Memory = 64 << 20
	vm := running(t, cfg, "FFFF")
	for range 3 {
		next := receiving(t, ReceiveConfig{})
		if r := vm.migrateTo(t, next.Addr().String()); r.Status != "completed" {
			t.Fatalf("%+v", r)
		}
		vm.ends(t, Migrated, "")
		next.con.AwaitPart(t, "FF")
		vm = next
	}
}

// stall passes bytes on to a receiver until it holds them back, in both directions.
type stall struct {
	ln   net.Listener
	hold sync.Mutex
}

func newStall(t *testing.T, to string) *stall {
	s := &stall{ln: listen(t)}
	var conns sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() {
		cancel()
		s.ln.Close()
		conns.Wait()
	})
	conns.Go(func() {
		for {
			a, err := s.ln.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", to)
			if err != nil {
				a.Close()
				continue
			}
			context.AfterFunc(ctx, func() { a.Close(); b.Close() })
			pump := func(to, from net.Conn) {
				defer to.Close()
				for buf := make([]byte, 64<<10); ; {
					n, err := from.Read(buf)
					s.hold.Lock()
					_, werr := to.Write(buf[:n])
					s.hold.Unlock()
					if err != nil || werr != nil {
						return
					}
				}
			}
			conns.Go(func() { pump(a, b) })
			conns.Go(func() { pump(b, a) })
		}
	})
	return s
}

// TestResetWaitsAndIsMadeHere: a guest whose reset waits for the destination is reset
// here when the migration ends otherwise, and goes on.
func TestResetWaitsAndIsMadeHere(t *testing.T) {
	start := func(t *testing.T) (vm *ran, m *migrate.Migration, release func()) {
		vm = full(t, testConfig(1, vmtest.Obey))
		s := newStall(t, receiving(t, ReceiveConfig{}).Addr().String())
		m = vm.inPrecopy(t, s.ln.Addr().String(), migrate.Options{Channels: 2})
		s.hold.Lock()
		vm.con.Type("r")
		for deadline := vmtest.Within(t); m.Result().GuestResets == 0; time.Sleep(time.Millisecond) {
			check(t, deadline.Err())
		}
		return vm, m, sync.OnceFunc(s.hold.Unlock)
	}
	t.Run("cancelled", func(t *testing.T) {
		vm, m, release := start(t)
		defer release()
		check(t, m.Cancel())
		vm.con.Await(t, "BB")
		release()
		if r := result(t, m); r.Status != "cancelled" {
			t.Errorf("%+v", r)
		}
		vm.goesOnAfterReset(t)
	})
	t.Run("paused", func(t *testing.T) {
		vm, m, release := start(t)
		defer release()
		paused := make(chan error, 1)
		go func() { paused <- vm.Pause(vmtest.Within(t)) }()
		check(t, m.Cancel())
		check(t, <-paused)
		vm.is(t, StatePaused)
		check(t, vm.Resume(t.Context(), false))
		vm.con.Await(t, "BB")
	})
	t.Run("stopped", func(t *testing.T) {
		vm, _, release := start(t)
		time.AfterFunc(10*time.Millisecond, release)
		check(t, vm.Stop(vmtest.Within(t)))
		vm.ends(t, Stopped, "")
	})
	t.Run("moved", func(t *testing.T) {
		vm, m, release := start(t)
		paused := make(chan error, 1)
		go func() { paused <- vm.Pause(vmtest.Within(t)) }()
		release()
		if r := result(t, m); r.Status != "completed" {
			t.Errorf("%+v", r)
		}
		vm.ends(t, Migrated, "")
		refused(t, <-paused, "moved away")
	})
}

func (r *ran) goesOnAfterReset(t *testing.T) {
	t.Helper()
	r.con.Type("x")
	r.con.Await(t, "BBx")
	next := receiving(t, ReceiveConfig{})
	if res := r.migrateTo(t, next.Addr().String()); res.Status != "completed" {
		t.Errorf("%+v", res)
	}
	next.con.Type("y")
	next.con.Await(t, "y")
}

// TestResetOfAGuestThatIsNotTaken: the destination gives the right to run back, and the
// guest, which waited for its reset, is reset here.
func TestResetOfAGuestThatIsNotTaken(t *testing.T) {
	cfg := testConfig(1, vmtest.Obey)
	path := vmtest.Image(t, "a.img", 1<<20)
	cfg.Devices = []virtio.Spec{disk(path)}
	vm := full(t, cfg)
	next := receiving(t, ReceiveConfig{Devices: []virtio.Spec{disk(vmtest.Image(t, "b.img", 1<<20))}})
	m := vm.inPrecopy(t, next.Addr().String(), migrate.Options{})
	next.lifeMu.Lock()
	next.refusing = true // its user has powered it off
	next.lifeMu.Unlock()
	vm.con.Type("r")
	if r := result(t, m); r.Status != "failed" || !strings.Contains(r.Error, "being stopped") || r.GuestResets != 1 {
		t.Errorf("%+v", r)
	}
	vm.con.Await(t, "BB")
	other, err := disk(path).Open(vmtest.Log(t))
	check(t, err)
	cannotLock(t, other.(virtio.Locker).Lock())
	check(t, other.Close())
}

// TestResetAndNoVerdict: a guest that was handed over with its reset is not reset here
// before a person has decided.
func TestResetAndNoVerdict(t *testing.T) {
	vm := full(t, testConfig(1, vmtest.Obey))
	next := receiving(t, ReceiveConfig{})
	p := newCut(t, next.Addr().String())
	m := vm.inPrecopy(t, p.ln.Addr().String(), migrate.Options{})
	vm.con.Type("r")
	for deadline := vmtest.Within(t); vm.Info().State != StateHandoffUnknown; time.Sleep(time.Millisecond) {
		check(t, deadline.Err())
	}
	next.con.Await(t, "B")
	if err := vm.Resume(t.Context(), false); !errors.Is(err, ErrMayRunElsewhere) {
		t.Errorf("%v", err)
	}
	if text := vm.con.Text(); text != "B" {
		t.Errorf("the source printed %q", text)
	}
	check(t, next.Stop(vmtest.Within(t)))
	check(t, vm.Resume(vmtest.Within(t), true))
	vm.con.Await(t, "BB")
	if r := result(t, m); r.Status != "failed" {
		t.Errorf("%+v", r)
	}
}

// TestPowerOffInPrecopy: a guest that ends in another way ends the migration, in one line
// that says so, at both sides.
func TestPowerOffInPrecopy(t *testing.T) {
	for key, c := range map[string]struct {
		kind OutcomeKind
		says string
	}{
		"p": {PoweredOff, "the guest powered off"},
		"i": {Crashed, "the guest crashed: KVM cannot go on"},
	} {
		vm := full(t, testConfig(1, vmtest.Obey))
		next := receiving(t, ReceiveConfig{})
		m := vm.inPrecopy(t, next.Addr().String(), migrate.Options{})
		vm.con.Type(key)
		r := result(t, m)
		if r.Status != "failed" || !strings.HasPrefix(r.Error, c.says) || strings.Contains(r.Error, "\n") || r.GuestResets != 0 {
			t.Errorf("%+v", r)
		}
		vm.ends(t, c.kind, "")
		next.is(t, StateReceiving)
	}
}
