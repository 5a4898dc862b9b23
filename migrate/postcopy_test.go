package migrate_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
	"pgregory.net/rapid"
)

// cutter is a network whose connections for memory that comes later are cut after some
// bytes, as long as it is told to.
type cutter struct {
	*simtest.Listener
	mu     sync.Mutex // guards random
	random *rand.Rand
	most   int          // bytes that such a connection carries at most; 0: any number
	cuts   atomic.Int32 // how many may be cut
	live   sync.Map
}

const purposeMissing = 5 // the purpose in a hello, at byte 12

func (c *cutter) Dial(ctx context.Context, addr string) (net.Conn, error) {
	nc, err := c.Listener.Dial(ctx, addr)
	if err != nil || c.most == 0 {
		return nc, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	cut := &cutConn{Conn: nc, net: c, left: int64(1 + c.random.IntN(c.most))}
	c.live.Store(cut, true)
	return cut, nil
}

type cutConn struct {
	net.Conn
	net    *cutter
	hello  bool
	counts bool
	left   int64
}

func (c *cutConn) Write(p []byte) (int, error) {
	if !c.hello && len(p) >= 64 {
		c.hello, c.counts = true, p[12] == purposeMissing
		return c.Conn.Write(p)
	}
	if c.counts {
		if c.left -= int64(len(p)); c.left < 0 && c.net.cuts.Add(-1) >= 0 {
			n, _ := c.Conn.Write(p[:len(p)/2])
			_ = c.Conn.Close()
			return n, net.ErrClosed
		}
	}
	return c.Conn.Write(p)
}

// later is one guest that moves with postcopy.
type later struct {
	world  *simtest.World
	source *simtest.Machine
	net    *cutter
	recv   *migrate.Receiver
	stop   func()
}

func newLater(t testing.TB, c simtest.Config, steps simtest.Steps, seed uint64, most, cuts int) *later {
	t.Helper()
	l := &later{world: simtest.NewWorld(), net: &cutter{Listener: simtest.Listen(), random: rand.New(rand.NewPCG(seed, 9)), most: most}}
	l.net.cuts.Store(int32(cuts))
	var err error
	if l.source, err = simtest.NewMachine(l.world, c); err != nil {
		t.Fatal(err)
	}
	l.recv = migrate.NewReceiver(&simtest.Builder{World: l.world, Steps: steps}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- l.recv.Serve(ctx, l.net) }()
	l.stop = func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		l.world.Close()
	}
	return l
}

func (l *later) migrate(opt migrate.Options) (migrate.Result, error) {
	opt.Dial = l.net.Dial
	m := migrate.New(l.source, "there", opt)
	return m.Run(context.Background())
}

func config(slots ...migrate.Slot) simtest.Config {
	return simtest.Config{Layout: simtest.Layout{Slots: slots, ManualProtect: true, InitiallySet: true}, CPUs: 2, Seed: 1, Fill: 1 << 20}
}

// A guest that rewrites its memory flat out moves after one round, and all of its memory
// follows.
func TestPostcopy(t *testing.T) {
	c := config(migrate.Slot{GPA: 0, Pages: 4000}, migrate.Slot{GPA: 1 << 32, Pages: 2001})
	c.Devices, c.Punches, c.KernelWrites = 50, 20, 20
	l := newLater(t, c, simtest.Steps{}, 1, 0, 0)
	defer l.stop()
	if err := l.source.Resume(); err != nil {
		t.Fatal(err)
	}
	r, err := l.migrate(migrate.Options{Postcopy: 1, DowntimeLimit: time.Millisecond, BandwidthLimit: 100 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if r.Postcopy == nil || r.Postcopy.Pages == 0 || r.Postcopy.Recoveries != 0 {
		t.Errorf("%+v", r.Postcopy)
	}
	if err := l.world.Err(); err != nil {
		t.Error(err)
	}
	if there := l.world.Holder(); there == l.source || !there.Running() || there.Balloon != nil {
		t.Error("the guest does not run there")
	}
	t.Logf("%+v, downtime %v", *r.Postcopy, r.Downtime)
}

// Auto moves a guest early only if rounds do not shrink.
func TestPostcopyAuto(t *testing.T) {
	for _, rate := range []uint64{0, 200} {
		t.Run(fmt.Sprint(rate), func(t *testing.T) {
			c := config(migrate.Slot{GPA: 0, Pages: 8000})
			c.Rate = rate
			l := newLater(t, c, simtest.Steps{}, 1, 0, 0)
			defer l.stop()
			if err := l.source.Resume(); err != nil {
				t.Fatal(err)
			}
			opt := migrate.Options{Postcopy: migrate.PostcopyAuto, DowntimeLimit: 30 * time.Millisecond}
			if rate == 0 {
				opt.BandwidthLimit, opt.DowntimeLimit = 40<<20, time.Millisecond
			}
			r, err := l.migrate(opt)
			if err != nil {
				t.Fatal(err)
			}
			if early := r.Postcopy != nil; early != (rate == 0) {
				t.Errorf("postcopy %v of a guest that writes %d pages a second", r.Postcopy, rate)
			}
			if err := l.world.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Connections that are lost are made again, and nothing is: whatever the seed, no page is
// lost, and none that the guest has written is overwritten.
func TestPostcopyProperty(t *testing.T) {
	disks := 0
	defer func() { t.Logf("%d guests moved early with their disks", disks) }()
	rapid.Check(t, func(rt *rapid.T) {
		var slots []migrate.Slot
		for i := range rapid.IntRange(1, 3).Draw(rt, "slots") {
			slots = append(slots, migrate.Slot{GPA: uint64(i) << 30, Pages: rapid.Uint64Range(1, 700).Draw(rt, "pages")})
		}
		c := config(slots...)
		c.Seed = rapid.Uint64().Draw(rt, "seed")
		c.CPUs = rapid.IntRange(1, 3).Draw(rt, "cpus")
		c.InitiallySet = rapid.Bool().Draw(rt, "initially set")
		c.Balloon = rapid.Bool().Draw(rt, "balloon")
		c.Devices, c.Punches, c.KernelWrites = rapid.IntRange(0, 200).Draw(rt, "devices"), rapid.IntRange(0, 100).Draw(rt, "punches"), rapid.IntRange(0, 100).Draw(rt, "kernel")
		for range rapid.SampledFrom([]int{0, 0, 0, 0, 1, 2}).Draw(rt, "disks") {
			c.Disks = append(c.Disks, 512*rapid.Uint64Range(1, 8000).Draw(rt, "sectors"))
			c.DiskWrites, c.DiskDirty, c.DiskFill = rapid.IntRange(1, 10).Draw(rt, "disk writes"), 64<<10, 1<<20
		}
		cuts := rapid.IntRange(0, 6).Draw(rt, "cuts")
		l := newLater(t, c, simtest.Steps{}, c.Seed, rapid.IntRange(1, 2<<20).Draw(rt, "most"), cuts)
		defer l.stop()
		if l.source.Balloon != nil {
			l.source.Balloon.Driver.TakeBack = rapid.IntRange(0, 1000).Draw(rt, "take back")
		}
		if err := l.source.Resume(); err != nil {
			rt.Fatal(err)
		}
		opt := migrate.Options{CopyDisks: len(c.Disks) > 0, Postcopy: rapid.IntRange(1, 3).Draw(rt, "rounds"), Channels: rapid.IntRange(1, 4).Draw(rt, "channels"), DowntimeLimit: time.Millisecond}
		if opt.CopyDisks { // what is left of them has to fit
			opt.DowntimeLimit, opt.MaxRounds = 3*time.Millisecond, 8
		}
		r, err := l.migrate(opt)
		for err != nil { // cut before the handoff: the guest goes on at the source
			if errors.Is(err, migrate.ErrServing) || errors.Is(err, migrate.ErrHandoffUnknown) || !l.source.Running() {
				rt.Fatal(err)
			}
			opt.DowntimeLimit *= 2 // of a guest that writes its disks faster than that
			r, err = l.migrate(opt)
		}
		if r.Postcopy != nil && opt.CopyDisks {
			disks++
		}
		there := l.world.Holder()
		if there == l.source || !there.Running() {
			rt.Fatal("the guest does not run there")
		}
		if err := l.world.Err(); err != nil {
			rt.Fatal(err)
		}
		for slot, s := range there.Slots() {
			for page := range s.Pages {
				if there.Absent(slot, page) {
					rt.Fatalf("slot %d page %d is missing for ever", slot, page)
				}
			}
		}
		if r.Postcopy != nil && r.Postcopy.Recoveries > 0 {
			rt.Logf("recovered %d times", r.Postcopy.Recoveries)
		}
	})
}

// A guest whose disks move along goes early, with all of them, though it writes them all the
// time; stops that would take too long for what is left of them are undone.
func TestPostcopyWithDisks(t *testing.T) {
	c := config(migrate.Slot{GPA: 0, Pages: 10000})
	c.Disks, c.DiskWrites, c.DiskDirty, c.DiskFill = []uint64{24 << 20, 3 << 20}, 100, 1<<20, 2<<20
	l := newLater(t, c, simtest.Steps{}, 1, 0, 0)
	defer l.stop()
	if err := l.source.Resume(); err != nil {
		t.Fatal(err)
	}
	r, err := l.migrate(migrate.Options{CopyDisks: true, Postcopy: 1, DowntimeLimit: 100 * time.Millisecond, BandwidthLimit: 60 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if r.Postcopy == nil || r.Postcopy.Pages == 0 || r.DiskBytes != 27<<20 || r.DiskBytesSent == 0 {
		t.Errorf("%+v, %d of %d bytes of disks", r.Postcopy, r.DiskBytesSent, r.DiskBytes)
	}
	if err := l.world.Err(); err != nil {
		t.Error(err)
	}
	t.Logf("%+v, downtime %v, %d stops undone", *r.Postcopy, r.Downtime, r.StopsUndone)
}

// A stop that is undone after memory was announced leaves the guest at the source, and a
// later one moves it.
func TestPostcopyUndone(t *testing.T) {
	c := config(migrate.Slot{GPA: 0, Pages: 3000})
	var n atomic.Int32
	l := newLater(t, c, simtest.Steps{}, 1, 0, 0)
	defer l.stop()
	l.source.Steps.Unlock = func(ctx context.Context) error {
		if n.Add(1) < 3 { // after PREPARED
			<-ctx.Done()
			return context.Cause(ctx)
		}
		return nil
	}
	if err := l.source.Resume(); err != nil {
		t.Fatal(err)
	}
	opt := migrate.Options{Postcopy: 1, DowntimeLimit: time.Millisecond, Dial: l.net.Dial}
	m := migrate.New(l.source, "there", opt)
	m.HurryGuard(50 * time.Millisecond)
	r, err := m.Run(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.world.Err(); err != nil {
		t.Error(err)
	}
	if r.StopsUndone < 2 || l.world.Holder() == l.source {
		t.Errorf("%d stops undone, %+v", r.StopsUndone, r.Postcopy)
	}
}

// A destination that cannot have memory later says why before anything is moved.
func TestPostcopyRefused(t *testing.T) {
	l := newLater(t, config(migrate.Slot{GPA: 0, Pages: 100}), simtest.Steps{Missing: func() error { return simtest.ErrRefused }}, 1, 0, 0)
	defer l.stop()
	if err := l.source.Resume(); err != nil {
		t.Fatal(err)
	}
	r, err := l.migrate(migrate.Options{Postcopy: 1, DowntimeLimit: time.Millisecond, BandwidthLimit: 100 << 20})
	if !errors.Is(err, migrate.ErrRefused) || r.PagesSent != 0 || !l.source.Running() {
		t.Errorf("%v, %+v", err, r)
	}
}

// While memory is missing, cancel is refused; what gives it up says so, and the guest does
// not run here again.
func TestPostcopyGivenUp(t *testing.T) {
	c := config(migrate.Slot{GPA: 0, Pages: 20000})
	l := newLater(t, c, simtest.Steps{}, 1, 0, 0)
	defer l.stop()
	if err := l.source.Resume(); err != nil {
		t.Fatal(err)
	}
	m := migrate.New(l.source, "there", migrate.Options{Postcopy: 1, BandwidthLimit: 40 << 20, Dial: l.net.Dial})
	done := make(chan error, 1)
	go func() {
		_, err := m.Run(context.Background())
		done <- err
	}()
	for !m.Serving() {
		time.Sleep(time.Millisecond)
	}
	if err := m.Cancel(); !errors.Is(err, migrate.ErrTooLate) {
		t.Errorf("cancel: %v", err)
	}
	if p := m.Progress(); p.Phase != migrate.PhasePostcopy {
		t.Errorf("phase %v", p.Phase)
	}
	m.Abandon()
	if err := <-done; !errors.Is(err, migrate.ErrServing) || errors.Is(err, migrate.ErrHandoffUnknown) {
		t.Errorf("given up: %v", err)
	}
	if l.source.Running() || m.Serving() {
		t.Error("the guest runs here, or memory is served")
	}
}
