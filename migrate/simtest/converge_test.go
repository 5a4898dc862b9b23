package simtest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
)

// tireless is a guest that writes faster than the link of slowly: it does not converge.
func tireless() Config {
	return Config{Layout: Layout{ManualProtect: true, Slots: []migrate.Slot{{Pages: 2048}}}, CPUs: 1, Seed: 3,
		Dirty: 1024, Rate: 4000, Fill: 1024}
}

func slowly() migrate.Options {
	o := options()
	o.VerifyPages = false
	o.BandwidthLimit = 8 << 20 // 2048 pages a second
	o.DowntimeLimit = 250 * time.Millisecond
	return o
}

func startTireless(t *testing.T, w *World) *Machine {
	t.Helper()
	m, err := NewMachine(w, tireless())
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	return m
}

// Without the throttle the migration of such a guest is given up, and the guest has not
// been slowed down.
func TestATirelessGuestIsGivenUp(t *testing.T) {
	w := newWorld(t)
	m := startTireless(t, w)
	addr, _ := receiver(t, &Builder{World: w})
	o := slowly()
	o.MaxRounds = 6
	mig := migrate.New(m, addr, o)
	if _, err := mig.Run(context.Background()); !errors.Is(err, migrate.ErrNotConverged) {
		t.Fatalf("Run: %v", err)
	}
	now, most := m.Throttled()
	if r := mig.Result(); most != 0 || r.ThrottlePercent != 0 || now != 0 || !m.Running() || len(r.Rounds) != 6 {
		t.Errorf("throttled to %d%%, running: %v, %+v", most, m.Running(), r)
	}
	if err := w.Err(); err != nil {
		t.Error(err)
	}
}

// fetches calls look before each fetch of the dirty log.
type fetches struct {
	*Machine
	look func()
}

func (f fetches) FetchDirtyLog(slot int, bitmap []uint64) error {
	f.look()
	return f.Machine.FetchDirtyLog(slot, bitmap)
}

// A guest that writes nothing, and a limit below the assumed cost of a stop: rounds in
// which nothing is dirty follow each other. None of them hangs, and the bandwidth stays
// what round 0 has measured.
func TestRoundsInWhichNothingIsDirty(t *testing.T) {
	const rounds = 50
	w := newWorld(t)
	m, err := NewMachine(w, tireless()) // and never resumed
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := receiver(t, &Builder{World: w})
	o := options()
	o.Channels, o.DowntimeLimit, o.MaxRounds = 2, time.Millisecond, rounds
	var mig *migrate.Migration
	seen := map[uint64]int{}
	mig = migrate.New(fetches{m, func() {
		if p := mig.Progress(); p.Round > 1 { // it is updated at the end of a round
			seen[p.BandwidthBytes]++
		}
	}}, addr, o)
	if _, err := mig.Run(context.Background()); !errors.Is(err, migrate.ErrNotConverged) {
		t.Fatalf("Run: %v", err)
	}
	r := mig.Result()
	if len(r.Rounds) != rounds || r.Rounds[0].PagesSent < 1024 {
		t.Fatalf("%d rounds, the first %+v", len(r.Rounds), r.Rounds[0])
	}
	for _, round := range r.Rounds[1:] {
		if round.DirtyPages != 0 || round.PagesSent != 0 {
			t.Errorf("a round of a guest that writes nothing: %+v", round)
		}
	}
	if len(seen) != 1 || seen[mig.Progress().BandwidthBytes] < rounds-2 || seen[0] != 0 {
		t.Errorf("the bandwidth of round 0 does not stay: %v", seen)
	}
	if err := w.Err(); err != nil {
		t.Error(err)
	}
}

// With the throttle the guest arrives, and runs at full speed afterwards.
func TestAutoConverge(t *testing.T) {
	w := newWorld(t)
	m := startTireless(t, w)
	addr, r := receiver(t, &Builder{World: w})
	o := slowly()
	o.AutoConverge = true
	mig := migrate.New(m, addr, o)
	if _, err := mig.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-r.Arrived()
	there := w.Holder()
	now, most := m.Throttled()
	if res := mig.Result(); most == 0 || now != 0 || res.ThrottlePercent != most || mig.Progress().ThrottlePercent != 0 {
		t.Errorf("throttled to %d%%, at the end %d%%, the result says %d%%", most, now, res.ThrottlePercent)
	}
	if now, most := there.Throttled(); now != 0 || most != 0 || there == m || !there.Running() {
		t.Errorf("at the destination: throttled to %d%%, %d%% now", most, now)
	}
	if err := w.Err(); err != nil {
		t.Error(err)
	}
}

// The throttle ends with the migration, however that ends.
func TestTheThrottleEndsWithTheMigration(t *testing.T) {
	broken := errors.New("broken on purpose")
	for name, end := range map[string]func(*Machine, *Builder, *migrate.Options) (cancel bool){
		"cancelled": func(*Machine, *Builder, *migrate.Options) bool { return true },
		"timed out": func(_ *Machine, _ *Builder, o *migrate.Options) bool {
			o.Timeout = 6 * time.Second
			o.DowntimeLimit = time.Millisecond // never
			return false
		},
		"failed save": func(m *Machine, _ *Builder, _ *migrate.Options) bool {
			m.Steps.Save = func() error { return broken }
			return false
		},
		"failed load": func(_ *Machine, b *Builder, _ *migrate.Options) bool {
			b.Steps.Load = func() error { return broken }
			return false
		},
		"failed start": func(_ *Machine, b *Builder, _ *migrate.Options) bool {
			b.Steps.Start = func() error { return broken }
			return false
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			m, err := NewMachine(w, tireless())
			if err != nil {
				t.Fatal(err)
			}
			o, b := slowly(), &Builder{World: w}
			o.AutoConverge = true
			cancel := end(m, b, &o)
			if cancel {
				o.DowntimeLimit = time.Millisecond
			}
			if err := m.Resume(); err != nil {
				t.Fatal(err)
			}
			addr, _ := receiver(t, b)
			mig := migrate.New(m, addr, o)
			ended := make(chan error, 1)
			go func() {
				_, err := mig.Run(context.Background())
				ended <- err
			}()
			if cancel {
				for now, _ := m.Throttled(); now == 0; now, _ = m.Throttled() {
					time.Sleep(time.Millisecond)
				}
				if err := mig.Cancel(); err != nil {
					t.Fatal(err)
				}
			}
			if err := <-ended; err == nil {
				t.Fatal("the migration completed")
			}
			if now, most := m.Throttled(); now != 0 || most == 0 || !m.Running() {
				t.Errorf("throttled to %d%%, %d%% at the end, running: %v", most, now, m.Running())
			}
			if err := w.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Saving a machine's state may write its memory while the last pages are under way: what it
// writes arrives.
func TestSavingMayWriteMemory(t *testing.T) {
	w := newWorld(t)
	c := busyGuest(Layout{ManualProtect: true, InitiallySet: true})
	m, err := NewMachine(w, c)
	if err != nil {
		t.Fatal(err)
	}
	m.Steps.Save = func() error {
		for page := range uint64(1000) {
			m.KernelWrite(0, page)()
			if page%100 == 0 {
				time.Sleep(time.Millisecond) // pages leave meanwhile
			}
		}
		m.DeviceWrite(1, 299)()
		return nil
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := send(t, transports[0], w, m, &Builder{World: w}); err != nil {
		t.Fatal(err)
	}
	if err := w.Err(); err != nil {
		t.Error(err)
	}
}

// A guest that writes much between the decision and the stop runs on, and arrives in the
// end.
func TestAStopThatWouldTakeTooLongIsUndone(t *testing.T) {
	w := newWorld(t)
	c := Config{Layout: Layout{ManualProtect: true, Slots: []migrate.Slot{{Pages: 2048}}}, CPUs: 1, Seed: 3, Dirty: 16, Rate: 100, Fill: 2048}
	m, err := NewMachine(w, c)
	if err != nil {
		t.Fatal(err)
	}
	stops := 0
	m.Steps.Pause = func(context.Context) error {
		if stops++; stops <= 2 {
			for page := range uint64(2048) {
				m.KernelWrite(0, page)()
			}
		}
		return nil
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	addr, r := receiver(t, &Builder{World: w})
	o := slowly() // 8 MiB at 8 MiB/s, with a limit of 250 ms
	mig := migrate.New(m, addr, o)
	if _, err := mig.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-r.Arrived()
	res := mig.Result()
	if stops != 3 || res.StopsUndone != 2 {
		t.Errorf("stopped %d times, %d undone", stops, res.StopsUndone)
	}
	// Each stop that is undone delays the next one: a round, then two.
	if len(res.Rounds) < 1+1+2 {
		t.Errorf("%d rounds", len(res.Rounds))
	}
	if err := w.Err(); err != nil {
		t.Error(err)
	}
}

// One that does so every time arrives too, late, and the result says why.
func TestAStopIsUndoneAFewTimesOnly(t *testing.T) {
	w := newWorld(t)
	c := Config{Layout: Layout{ManualProtect: true, Slots: []migrate.Slot{{Pages: 2048}}}, CPUs: 1, Seed: 3, Dirty: 16, Rate: 100, Fill: 2048}
	m, err := NewMachine(w, c)
	if err != nil {
		t.Fatal(err)
	}
	stops := 0
	m.Steps.Pause = func(context.Context) error {
		stops++
		for page := range uint64(2048) {
			m.KernelWrite(0, page)()
		}
		return nil
	}
	m.Steps.Save = func() error {
		time.Sleep(400 * time.Millisecond) // certainly more than the limit
		return nil
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	addr, r := receiver(t, &Builder{World: w})
	mig := migrate.New(m, addr, slowly())
	if _, err := mig.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-r.Arrived()
	if res := mig.Result(); res.StopsUndone != stops-1 || stops != 5 || res.DowntimeNote == "" {
		t.Errorf("stopped %d times, %d undone, the note is %q", stops, res.StopsUndone, res.DowntimeNote)
	}
	if err := w.Err(); err != nil {
		t.Error(err)
	}
}
