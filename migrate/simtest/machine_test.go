package simtest

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testcert"
	"github.com/govmm/govmm/migrate"
)

// receiver serves destinations of a world on loopback until the test ends.
func receiver(t *testing.T, b *Builder) (addr string, r *migrate.Receiver) {
	t.Helper()
	to, r := receiverOver(t, transports[0], b)
	return to.addr, r
}

// place is where a receiver can be reached.
type place struct {
	addr string
	dial dial
	tls  *tls.Config
}

func receiverOver(t *testing.T, tr transport, b *Builder) (to place, r *migrate.Receiver) {
	t.Helper()
	ln, d := tr.listen(t)
	to = place{addr: ln.Addr().String(), dial: d}
	ctx, cancel := context.WithCancel(context.Background())
	r = migrate.NewReceiver(b, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if tr.secure {
		ca := testcert.NewCA(t, "the CA")
		to.tls = ca.Client(ca.Issue(t, "here"), "there")
		if err := r.RequireTLS(ca.Server(ca.Issue(t, "there"))); err != nil {
			t.Fatal(err)
		}
	}
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		<-served
	})
	return to, r
}

func newWorld(t *testing.T) *World {
	w := NewWorld()
	t.Cleanup(w.Close)
	return w
}

// options are for a guest that is small and busy.
func options() migrate.Options {
	o := migrate.DefaultOptions()
	o.VerifyPages = true
	return o
}

// send migrates the world's guest from the machine that holds it.
func send(t *testing.T, tr transport, w *World, src migrate.Source, b *Builder) error {
	t.Helper()
	to, r := receiverOver(t, tr, b)
	o := options()
	o.Dial, o.TLS = to.dial, to.tls
	if _, err := migrate.New(src, to.addr, o).Run(context.Background()); err != nil {
		return err
	}
	<-r.Arrived()
	return nil
}

func busyGuest(l Layout) Config {
	l.Slots = []migrate.Slot{{GPA: 0, Pages: 1000}, {GPA: 4 << 30, Pages: 300}}
	return Config{Layout: l, CPUs: 2, Seed: 7, Dirty: 100, Devices: 100, Punches: 20, KernelWrites: 50, Fill: 600}
}

func TestABusyGuestMovesWhole(t *testing.T) {
	overEach(t, func(t *testing.T, tr transport) {
		for _, c := range []struct {
			name   string
			layout Layout
		}{
			{"without manual protect", Layout{}},
			{"manual protect", Layout{ManualProtect: true}},
			{"initially set", Layout{ManualProtect: true, InitiallySet: true}},
			{"holes unknown", Layout{ManualProtect: true, HolesUnknown: true}},
		} {
			t.Run(c.name, func(t *testing.T) {
				w := newWorld(t)
				m, err := NewMachine(w, busyGuest(c.layout))
				if err != nil {
					t.Fatal(err)
				}
				if err := m.Resume(); err != nil {
					t.Fatal(err)
				}
				for n := 1; n <= 3; n++ {
					before := w.Holder()
					if err := send(t, tr, w, before, &Builder{World: w}); err != nil {
						t.Fatal(err)
					}
					if w.Arrivals() != n || w.Holder() == before || !w.Holder().Running() || before.Running() {
						t.Fatalf("after migration %d: %d arrivals, the guest runs there: %v, here: %v",
							n, w.Arrivals(), w.Holder().Running(), before.Running())
					}
				}
				if err := w.Err(); err != nil {
					t.Error(err)
				}
				if first, last := m.Writes(), w.Holder().Writes(); last[0] < first[0] || last[1] < first[1] {
					t.Errorf("the vCPUs had written %d pages when the guest left, and %d now", first, last)
				}
			})
		}
	})
}

func TestAPausedGuestArrivesPaused(t *testing.T) {
	overEach(t, func(t *testing.T, tr transport) {
		w := newWorld(t)
		m, err := NewMachine(w, busyGuest(Layout{ManualProtect: true}))
		if err != nil {
			t.Fatal(err)
		}
		if err := send(t, tr, w, m, &Builder{World: w}); err != nil {
			t.Fatal(err)
		}
		there := w.Holder()
		if there == m || there.Running() {
			t.Fatalf("arrived: %v, running: %v", there != m, there.Running())
		}
		if err := errors.Join(there.Resume(), there.Pause(), w.Err()); err != nil {
			t.Error(err)
		}
	})
}

// If any step fails, the guest goes on at the source, and can be sent again. Of what
// went wrong at the destination the source reads only that it is in a log.
func TestAFailedStepLeavesTheGuestAtTheSource(t *testing.T) {
	overEach(t, func(t *testing.T, tr transport) {
		broken := errors.New("broken on purpose")
		fail := func() error { return broken }
		for _, c := range []struct {
			name        string
			source      Steps
			destination Builder
			there       bool
		}{
			{name: "configuration", source: Steps{Config: fail}},
			{name: "build", there: true, destination: Builder{Refuse: []error{broken}}},
			{name: "pause", source: Steps{Pause: func(context.Context) error { return broken }}},
			{name: "save", source: Steps{Save: fail}},
			{name: "sample", source: Steps{Sample: fail}},
			{name: "compare", there: true, destination: Builder{Steps: Steps{Compare: fail}}},
			{name: "prepare", there: true, destination: Builder{Steps: Steps{Prepare: fail}}},
			{name: "load", there: true, destination: Builder{Steps: Steps{Load: fail}}},
			{name: "start", there: true, destination: Builder{Steps: Steps{Start: fail}}},
		} {
			t.Run(c.name, func(t *testing.T) {
				w := newWorld(t)
				m, err := NewMachine(w, busyGuest(Layout{ManualProtect: true}))
				if err != nil {
					t.Fatal(err)
				}
				if err := m.Resume(); err != nil {
					t.Fatal(err)
				}
				m.Steps, c.destination.World = c.source, w
				says, not := broken.Error(), "log"
				if c.there {
					says, not = "see the destination's log", broken.Error()
				}
				if err := send(t, tr, w, m, &c.destination); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), not) {
					t.Fatalf("error %v, want %q and not %q in it", err, says, not)
				}
				if !m.Running() || m.Logging() || w.Arrivals() != 0 {
					t.Fatalf("runs at the source: %v, logs: %v, %d arrivals", m.Running(), m.Logging(), w.Arrivals())
				}
				m.Steps = Steps{}
				if err := send(t, tr, w, m, &Builder{World: w}); err != nil {
					t.Fatal(err)
				}
				if err := w.Err(); err != nil || w.Arrivals() != 1 {
					t.Errorf("%d arrivals, error %v", w.Arrivals(), err)
				}
			})
		}
	})
}

// The destination reaches other storage than the source: the guest goes on at the source,
// which says how they differ.
func TestOtherStorageIsRefused(t *testing.T) {
	w := newWorld(t)
	m, err := NewMachine(w, busyGuest(Layout{ManualProtect: true}))
	if err != nil {
		t.Fatal(err)
	}
	m.Storage = "root"
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	err = send(t, transports[0], w, m, &Builder{World: w, Storage: "data"})
	if err == nil || !strings.Contains(err.Error(), "the destination gave up: compare the storage of a simulated machine: expected") {
		t.Fatalf("error %v", err)
	}
	if !m.Running() || m.Logging() || w.Arrivals() != 0 {
		t.Fatalf("runs at the source: %v, logs: %v, %d arrivals", m.Running(), m.Logging(), w.Arrivals())
	}
	if err := send(t, transports[0], w, m, &Builder{World: w, Storage: "root"}); err != nil {
		t.Fatal(err)
	}
	if err := w.Err(); err != nil || w.Arrivals() != 1 {
		t.Errorf("%d arrivals, error %v", w.Arrivals(), err)
	}
}

// A destination of a version that does not compare storage still takes guests.
func TestStorageIsComparedWhereBothSidesCan(t *testing.T) {
	for _, can := range []bool{true, false} {
		w := newWorld(t)
		m, err := NewMachine(w, busyGuest(Layout{ManualProtect: true}))
		if err != nil {
			t.Fatal(err)
		}
		compared := false
		b := &Builder{World: w, Steps: Steps{Compare: func() error { compared = true; return nil }}}
		src := migrate.Source(m)
		if !can {
			src = struct {
				migrate.Source
				migrate.Throttler
			}{m, m}
		}
		if err := send(t, transports[0], w, src, b); err != nil {
			t.Fatal(err)
		}
		if compared != can {
			t.Errorf("the source can be compared: %v; it was: %v", can, compared)
		}
	}
}

// deafSource does not report what its devices write.
type deafSource struct{ *Machine }

func (deafSource) FetchVMMDirty(int, func(int, uint64)) error { return nil }

// PauseForHandoff lets a device write, at the last moment, a page that the guest does not
// write.
func (d deafSource) PauseForHandoff(ctx context.Context) (bool, error) {
	wasRunning, err := d.Machine.PauseForHandoff(ctx)
	d.DeviceWrite(0, 500)()
	return wasRunning, err
}

func TestTheWorldSeesALostWrite(t *testing.T) {
	w := newWorld(t)
	m, err := NewMachine(w, busyGuest(Layout{ManualProtect: true}))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	addr, r := receiver(t, &Builder{World: w})
	o := options()
	o.VerifyPages = false // it would refuse the handoff
	if _, err := migrate.New(deafSource{m}, addr, o).Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-r.Arrived()
	if err := w.Err(); err == nil || !strings.Contains(err.Error(), "slot 0 page 0x1f4") {
		t.Errorf("a machine whose device writes go unnoticed: %v", err)
	}
}

func TestTheWorldSeesTwoMachinesRun(t *testing.T) {
	w := newWorld(t)
	for range 2 {
		m, err := NewMachine(w, busyGuest(Layout{}))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Err(); err == nil || !strings.Contains(err.Error(), "2 machines run one guest") {
		t.Errorf("error %v", err)
	}
}

// A guest with a seed makes the same writes in every run.
func TestAGuestIsTheSameForOneSeed(t *testing.T) {
	var places [2][]uint64
	for i := range places {
		w := newWorld(t)
		c := busyGuest(Layout{})
		c.CPUs, c.Rate = 1, 100000
		m, err := NewMachine(w, c)
		if err != nil {
			t.Fatal(err)
		}
		v := m.cpus[0]
		for range 1000 {
			v.write()
		}
		for slot, s := range m.Slots() {
			for page := range s.Pages {
				places[i] = append(places[i], m.Seq(slot, page))
			}
		}
	}
	for i := range places[0] {
		if places[0][i] != places[1][i] {
			t.Fatalf("page %d: #%d and #%d", i, places[0][i], places[1][i])
		}
	}
}

func TestARateHoldsTheGuestBack(t *testing.T) {
	w := newWorld(t)
	c := busyGuest(Layout{})
	c.CPUs, c.Rate = 1, 5000
	m, err := NewMachine(w, c)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	for m.Writes()[0] < 100 {
		time.Sleep(time.Millisecond)
	}
	if err := m.Pause(); err != nil {
		t.Fatal(err)
	}
	// Only an upper bound: how slow it is depends on the scheduler.
	if got, most := m.Writes()[0], uint64(time.Since(began).Seconds()*5000)+10; got > most {
		t.Errorf("%d writes in %v, want %d at most", got, time.Since(began), most)
	}
}
