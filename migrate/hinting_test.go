package migrate_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
)

// hintRig is a guest with a balloon, and the options to send it with.
type hintRig struct {
	t     *testing.T
	world *simtest.World
	guest *simtest.Machine
	opt   migrate.Options
}

// newHintRig makes a guest of 4096 and 1024 pages with content. It writes the first 64
// pages of each slot all the time. driver is its balloon driver.
func newHintRig(t *testing.T, driver simtest.Driver, change func(*simtest.Config)) *hintRig {
	t.Helper()
	c := simtest.Config{
		Layout: simtest.Layout{Slots: []migrate.Slot{{GPA: 0, Pages: 4096}, {GPA: 4 << 30, Pages: 1024}},
			ManualProtect: true, InitiallySet: true},
		CPUs: 1, Seed: 3, Dirty: 64, Rate: 2000, Fill: 4096, Balloon: true,
	}
	if change != nil {
		change(&c)
	}
	w := simtest.NewWorld()
	t.Cleanup(w.Close)
	m, err := simtest.NewMachine(w, c)
	if err != nil {
		t.Fatal(err)
	}
	if m.Balloon != nil {
		m.Balloon.Driver = driver
	}
	opt := migrate.DefaultOptions()
	opt.Hints, opt.VerifyPages, opt.HintWait = migrate.HintsOn, true, migrate.MaxHintWait
	return &hintRig{t, w, m, opt}
}

// run starts the guest, sends it, and returns the result.
func (r *hintRig) run() migrate.Result {
	r.t.Helper()
	if err := r.guest.Resume(); err != nil {
		r.t.Fatal(err)
	}
	return r.send()
}

// send sends the guest from the machine that it is on; its driver goes with it.
func (r *hintRig) send() migrate.Result {
	r.t.Helper()
	m, arrived := r.start(r.world.Holder())
	if _, err := m.Run(context.Background()); err != nil {
		r.t.Fatal(err)
	}
	<-arrived
	if err := r.world.Err(); err != nil {
		r.t.Fatal(err)
	}
	return m.Result()
}

// start prepares a migration of a machine to a new receiver.
func (r *hintRig) start(src migrate.Source) (*migrate.Migration, <-chan migrate.Target) {
	r.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.t.Fatal(err)
	}
	b := &passDriver{Builder: simtest.Builder{World: r.world}, from: r.guest}
	receiver := migrate.NewReceiver(b, slog.New(slog.NewTextHandler(r.t.Output(), nil)))
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- receiver.Serve(ctx, ln) }()
	r.t.Cleanup(func() {
		cancel()
		<-served
	})
	return migrate.New(src, ln.Addr().String(), r.opt), receiver.Arrived()
}

// passDriver gives the machines that it builds the first one's driver.
type passDriver struct {
	simtest.Builder
	from *simtest.Machine
}

func (b *passDriver) Build(ctx context.Context, config []byte) (migrate.Target, error) {
	t, err := b.Builder.Build(ctx, config)
	if m, ok := t.(*simtest.Machine); ok && m.Balloon != nil {
		m.Balloon.Driver = b.from.Balloon.Driver
	}
	return t, err
}

const rigPages = 4096 + 1024

func TestHintedPagesStayOffTheWire(t *testing.T) {
	r := newHintRig(t, simtest.Driver{Skip: 64}, nil)
	got := r.run()
	const free = rigPages - 2*64
	if got.PagesHinted != free || got.HintsReceived != free || got.HintsLate != 0 || got.HintsRewritten != 0 || got.HintsOff != "" {
		t.Errorf("of %d free pages %d stayed off the wire: %+v", free, got.PagesHinted, got)
	}
	if all := got.PagesSent + got.PagesZero + got.PagesHole; all > free || got.BytesSent > rigPages*mempage.Size/2 {
		t.Errorf("%d pages, %d bytes went over the wire", all, got.BytesSent)
	}
	if got.Rounds[0].PagesHinted != free {
		t.Errorf("the first round hints %d pages", got.Rounds[0].PagesHinted)
	}
	// STOP before the vCPUs stop, DONE in the state.
	if commands := r.guest.Balloon.Commands(); !slices.Equal(commands, []uint32{2, 0, 1}) {
		t.Errorf("announced %v", commands)
	}
}

// Without hints the same guest is sent whole.
func TestHintsTurnedOff(t *testing.T) {
	r := newHintRig(t, simtest.Driver{}, nil)
	r.opt.Hints = migrate.HintsOff
	if got := r.run(); got.PagesHinted != 0 || got.PagesSent < rigPages || got.HintsOff != "turned off" || r.guest.Balloon.Commands() != nil {
		t.Errorf("%+v, announced %v", got, r.guest.Balloon.Commands())
	}
}

// A page is hinted, taken back and written at once, by the driver and by vCPUs, devices
// and the kernel, while slots are fetched, cleared and sent: no write may be lost. The
// world compares all pages that were not given up.
func TestHintsOfAGuestThatTakesPagesBack(t *testing.T) {
	for _, c := range []struct {
		name   string
		layout simtest.Layout
		shift  uint
	}{
		{"without manual protect", simtest.Layout{}, 18},
		{"manual protect", simtest.Layout{ManualProtect: true}, 18},
		{"initially set", simtest.Layout{ManualProtect: true, InitiallySet: true}, 9},
		{"holes unknown", simtest.Layout{ManualProtect: true, InitiallySet: true, HolesUnknown: true}, 6},
	} {
		t.Run(c.name, func(t *testing.T) {
			// On a busy host the driver may not run before the guest has moved.
			var got migrate.Result
			for range 20 {
				r := newHintRig(t, simtest.Driver{TakeBack: 300}, func(s *simtest.Config) {
					c.layout.Slots = s.Slots
					s.Layout, s.Dirty, s.Fill, s.CPUs, s.Rate = c.layout, 0, 1000, 2, 20000
					s.Devices, s.Punches, s.KernelWrites = 100, 20, 50
				})
				r.opt.ClearBitmapShift = c.shift
				r.opt.HintWait = time.Millisecond
				got = r.run()
				r.send()
				if got.HintsReceived > 0 && got.HintsRewritten > 0 {
					return
				}
			}
			t.Errorf("%+v", got)
		})
	}
}

func TestGuestsThatCannotBeAsked(t *testing.T) {
	for _, c := range []struct {
		name   string
		driver simtest.Driver
		change func(*simtest.Config)
		why    string
	}{
		{"no balloon", simtest.Driver{}, func(c *simtest.Config) { c.Balloon = false }, "no balloon"},
		{"no driver", simtest.Driver{Absent: true}, nil, "no balloon driver"},
		{"poison", simtest.Driver{Poison: true}, nil, "pattern"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newHintRig(t, c.driver, c.change)
			got := r.run()
			if !strings.Contains(got.HintsOff, c.why) || got.PagesHinted != 0 || got.HintWait > time.Second {
				t.Errorf("%+v", got)
			}
			if r.guest.Balloon != nil && r.guest.Balloon.Commands() != nil {
				t.Errorf("announced %v", r.guest.Balloon.Commands())
			}
		})
	}
}

func TestASilentGuestIsNotWaitedForForever(t *testing.T) {
	r := newHintRig(t, simtest.Driver{Silent: true}, nil)
	r.opt.HintWait = 40 * time.Millisecond
	got := r.run()
	if !strings.Contains(got.HintsOff, "did not answer") || got.PagesHinted != 0 {
		t.Errorf("%+v", got)
	}
	if commands := r.guest.Balloon.Commands(); !slices.Equal(commands, []uint32{2, 0, 1}) {
		t.Errorf("announced %v", commands)
	}
}

// A guest that hints and never says STOP is not asked a second time: a hint of the first
// answer could not be distinguished from one of the next.
func TestAnAnswerWithoutEnd(t *testing.T) {
	r := newHintRig(t, simtest.Driver{Endless: true, Skip: 64}, nil)
	r.opt.HintWait = 100 * time.Millisecond
	if got := r.run(); got.PagesHinted == 0 || !slices.Equal(r.guest.Balloon.Commands(), []uint32{2, 0, 1}) {
		t.Errorf("%+v, announced %v", got, r.guest.Balloon.Commands())
	}
}

func TestTheDriverIsResetWhileItHints(t *testing.T) {
	r := newHintRig(t, simtest.Driver{Skip: 64}, nil)
	var served atomic.Int32
	r.guest.Balloon.Served = func() {
		if served.Add(1) == 20 {
			r.guest.Balloon.Lose()
		}
	}
	got := r.run()
	if !strings.Contains(got.HintsOff, "has been reset") || got.PagesHinted == 0 || got.PagesHinted > 20*64 {
		t.Errorf("%+v", got)
	}
}

// A migration that is cancelled while the guest hints returns the guest's pages, and the
// next one gets hints under another id.
func TestCancelDuringHints(t *testing.T) {
	r := newHintRig(t, simtest.Driver{Pace: time.Millisecond}, nil)
	var migration atomic.Pointer[migrate.Migration]
	var served atomic.Int32
	r.guest.Balloon.Served = func() {
		if m := migration.Load(); m != nil && served.Add(1) == 10 {
			if err := m.Cancel(); err != nil {
				t.Error(err)
			}
		}
	}
	if err := r.guest.Resume(); err != nil {
		t.Fatal(err)
	}
	m, _ := r.start(r.guest)
	migration.Store(m)
	if _, err := m.Run(context.Background()); !errors.Is(err, migrate.ErrCancelled) {
		t.Fatal(err)
	}
	if commands := r.guest.Balloon.Commands(); !slices.Equal(commands, []uint32{2, 0, 1}) || !r.guest.Running() {
		t.Errorf("announced %v, the guest runs: %v", commands, r.guest.Running())
	}
	r.opt.HintWait = migrate.MaxHintWait
	if got := r.send(); got.PagesHinted == 0 {
		t.Errorf("%+v", got)
	}
	if commands := r.guest.Balloon.Commands(); commands[3] != 3 {
		t.Errorf("announced %v", commands)
	}
}

// The counter of ids moves with the guest: a driver ignores the id that it answered last.
func TestBackAtOnce(t *testing.T) {
	r := newHintRig(t, simtest.Driver{Skip: 64}, nil)
	r.run()
	for n := range uint32(4) {
		if got := r.send(); got.HintsReceived == 0 {
			t.Fatalf("migration %d: %+v", n, got)
		}
	}
	var ids []uint32
	for _, m := range r.world.Machines() {
		for _, c := range m.Balloon.Commands() {
			if c > 1 {
				ids = append(ids, c)
			}
		}
	}
	if !slices.IsSorted(ids) || len(slices.Compact(slices.Clone(ids))) != len(ids) || len(ids) < 5 {
		t.Errorf("ids %v", ids)
	}
}

// A stop that would take too long is undone. The guest must not use its hinted pages
// before it is at the destination: DONE is announced once.
func TestAStopThatIsUndone(t *testing.T) {
	r := newHintRig(t, simtest.Driver{Skip: 64}, nil)
	r.opt.BandwidthLimit = 4 << 20
	r.opt.VerifyPages = false
	stops := 0
	r.guest.Steps.Pause = func(context.Context) error {
		if stops++; stops == 1 {
			for page := range uint64(3000) {
				r.guest.DeviceWrite(0, page)()
			}
		}
		return nil
	}
	got := r.run()
	commands := r.guest.Balloon.Commands()
	if !slices.Equal(commands[:2], []uint32{2, 0}) || slices.Index(commands, 1) != len(commands)-1 {
		t.Errorf("announced %v in %d stops, %+v", commands, stops, got)
	}
	if stops < 2 || got.HintsRewritten < 2000 {
		t.Errorf("%d stops, %+v", stops, got)
	}
}

// The stop waits for the device, which is serving a request.
func TestThePauseWhileAHintIsServed(t *testing.T) {
	r := newHintRig(t, simtest.Driver{Skip: 64, Pace: time.Millisecond}, nil)
	r.opt.HintWait = time.Millisecond
	if err := r.guest.Resume(); err != nil {
		t.Fatal(err)
	}
	m, arrived := r.start(r.guest)
	var held atomic.Bool
	r.guest.Balloon.Served = func() {
		for m.Progress().Phase == migrate.PhasePrecopy {
			held.Store(true)
			time.Sleep(time.Millisecond)
		}
	}
	if _, err := m.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-arrived
	if err := r.world.Err(); err != nil || !held.Load() {
		t.Errorf("held: %v, %v", held.Load(), err)
	}
}

// hostile answers in ways that no driver may.
type hostile struct {
	*simtest.Machine
	sink mempage.HintSink
}

func (h *hostile) HintSource() migrate.HintSource {
	return struct {
		*hostileSource
	}{(*hostileSource)(h)}
}

type hostileSource hostile

func (h *hostileSource) SetHintSink(s mempage.HintSink) {
	if s != nil {
		h.sink = s
	}
}
func (h *hostileSource) NewHintID() (uint32, error) { return 9, nil }
func (h *hostileSource) StopHints()                 {}
func (h *hostileSource) DoneHints()                 {}
func (h *hostileSource) AnnounceHints(id uint32) {
	const most = ^uint64(0)
	const page, high = mempage.Size, uint64(4 << 30) // high is where slot 1 begins
	wild := []mempage.Range{{GPA: 4096 * page, Bytes: 9 * page}, {GPA: high + 1024*page, Bytes: most - high - 1024*page}, {GPA: most - page + 1, Bytes: page},
		{GPA: most, Bytes: most}, {GPA: 0, Bytes: 0}, {GPA: 1, Bytes: page}, {GPA: high + 1020*page, Bytes: most - high - 1020*page}}
	h.sink.HintPages(id, wild) // before START
	h.sink.HintStop()
	h.sink.HintStart(id + 1)
	h.sink.HintStart(id)
	h.sink.HintPages(id, wild)
	h.sink.HintPages(id-1, wild)
	h.sink.HintPages(id, nil)
	h.sink.HintStart(id)
	h.sink.HintStop()
	h.sink.HintPages(id, []mempage.Range{{GPA: 0, Bytes: 4096 * page}}) // after STOP
	h.sink.HintStop()
}

func TestWildHints(t *testing.T) {
	r := newHintRig(t, simtest.Driver{Silent: true}, nil)
	m, arrived := r.start(&hostile{Machine: r.guest})
	// The world does not know that the four pages at the end of the second slot were
	// hinted: it must see no other page differ.
	if _, err := m.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-arrived
	got := m.Result()
	if got.PagesHinted != 4 {
		t.Errorf("%d pages taken for free, want 4: %+v", got.PagesHinted, got)
	}
	losses := simtest.Compare(r.guest.Memory, r.world.Holder().Memory)
	for _, l := range losses {
		if l.Slot != 1 || l.Page < 1020 {
			t.Errorf("lost: %v", l)
		}
	}
}

// In a later round the guest hints what has become free since.
func TestHintsInLaterRounds(t *testing.T) {
	r := newHintRig(t, simtest.Driver{Skip: 64}, nil)
	r.opt.BandwidthLimit = 2 << 20 // rounds are longer than answers
	r.opt.VerifyPages = false
	var pauses int
	r.guest.Steps.Pause = func(context.Context) error {
		if pauses++; pauses == 1 {
			for page := uint64(64); page < 4000; page++ {
				r.guest.DeviceWrite(0, page)()
			}
		}
		return nil
	}
	got := r.run()
	if c := r.guest.Balloon.Commands(); !slices.Contains(c, 3) {
		t.Errorf("announced %v: %+v", c, got)
	}
	var hinted uint64
	for _, x := range got.Rounds[1:] {
		hinted += x.PagesHinted
	}
	if hinted < 3900*3/4 { // the round may be at some of it before the answer is
		t.Errorf("later rounds hinted %d pages: %+v", hinted, got)
	}
}
