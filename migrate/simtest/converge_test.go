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

// A paused guest has no downtime: it goes at once, whatever the limit is, and is not
// stopped to measure anything.
func TestAPausedGuestGoesAtOnce(t *testing.T) {
	w := newWorld(t)
	m, err := NewMachine(w, tireless()) // and never resumed
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := receiver(t, &Builder{World: w})
	o := options()
	o.DowntimeLimit = time.Millisecond
	mig := migrate.New(m, addr, o)
	if _, err := mig.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	if r := mig.Result(); len(r.Rounds) != 2 || r.StopsUndone+r.TrialStops != 0 || r.DowntimeNote != "" {
		t.Errorf("%d rounds, %d stops undone, %d tried, %q", len(r.Rounds), r.StopsUndone, r.TrialStops, r.DowntimeNote)
	}
	if err := w.Err(); err != nil {
		t.Error(err)
	}
}

// A guest that hardly writes moves within any limit, also one that is less than what is
// assumed of a stop, or than any stop can take: what a stop costs is measured.
func TestAnIdleGuestAndATightLimit(t *testing.T) {
	for _, limit := range []time.Duration{time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond} {
		t.Run(limit.String(), func(t *testing.T) {
			w := newWorld(t)
			c := tireless()
			c.Rate = 10
			m, err := NewMachine(w, c)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Resume(); err != nil {
				t.Fatal(err)
			}
			addr, r := receiver(t, &Builder{World: w})
			o := options()
			o.VerifyPages, o.DowntimeLimit = false, limit
			mig := migrate.New(m, addr, o)
			if _, err := mig.Run(context.Background()); err != nil {
				t.Fatal(err)
			}
			<-r.Arrived()
			res := mig.Result()
			if res.TrialStops == 0 || res.TrialStops > 4 || len(res.Rounds) > 200 {
				t.Errorf("%d rounds, %d stops tried", len(res.Rounds), res.TrialStops)
			}
			if float64(res.Downtime) > 1.2*float64(limit) && res.DowntimeNote == "" {
				t.Errorf("stopped for %v, and nothing says why", res.Downtime)
			}
			if err := w.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Disks are flushed before the stop, while rounds go on, and not in it.
func TestDisksAreFlushedBeforeTheStop(t *testing.T) {
	w := newWorld(t)
	m, err := NewMachine(w, tireless())
	if err != nil {
		t.Fatal(err)
	}
	slow := make(chan struct{})
	flushes, stops := 0, 0
	m.Steps.Flush = func(ctx context.Context) error {
		if flushes++; flushes == 1 {
			<-slow
		}
		return nil
	}
	m.Steps.Pause = func(context.Context) error {
		if stops++; flushes == 0 {
			t.Error("stopped before the disks were flushed")
		}
		return nil
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	addr, r := receiver(t, &Builder{World: w})
	o := slowly()
	o.DowntimeLimit = time.Hour // it fits after round 0
	mig := migrate.New(m, addr, o)
	ended := make(chan error, 1)
	go func() {
		_, err := mig.Run(context.Background())
		ended <- err
	}()
	for mig.Progress().Round < 5 {
		select {
		case err := <-ended:
			t.Fatalf("ended while the disks were flushed: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	close(slow)
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	<-r.Arrived()
	if res := mig.Result(); stops != 1 || res.StopsUndone != 0 {
		t.Errorf("stopped %d times, %d undone", stops, res.StopsUndone)
	}
	if err := w.Err(); err != nil {
		t.Error(err)
	}
}

// A flush that never ends keeps nobody from cancelling, and the guest never stops. One that
// fails ends the migration before the stop.
func TestAFlushThatDoesNotSucceed(t *testing.T) {
	broken := errors.New("broken on purpose")
	for name, flush := range map[string]func(context.Context) error{
		"hangs": func(ctx context.Context) error {
			<-ctx.Done()
			return context.Cause(ctx)
		},
		"fails": func(context.Context) error { return broken },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			m, err := NewMachine(w, tireless())
			if err != nil {
				t.Fatal(err)
			}
			begun := make(chan struct{}, 1)
			m.Steps.Flush = func(ctx context.Context) error {
				begun <- struct{}{}
				return flush(ctx)
			}
			m.Steps.Pause = func(context.Context) error {
				t.Error("the guest was stopped")
				return nil
			}
			if err := m.Resume(); err != nil {
				t.Fatal(err)
			}
			addr, _ := receiver(t, &Builder{World: w})
			o := slowly()
			o.DowntimeLimit = time.Hour
			mig := migrate.New(m, addr, o)
			want := broken
			if name == "hangs" {
				want = migrate.ErrCancelled
				go func() {
					<-begun
					_ = mig.Cancel()
				}()
			}
			if _, err := mig.Run(context.Background()); !errors.Is(err, want) {
				t.Errorf("Run: %v", err)
			}
			if !m.Running() {
				t.Error("the guest does not run")
			}
		})
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
	// One of the two may have been a trial, where the machine is so busy that a stop looked dear.
	if stops != 3 || res.StopsUndone < 1 || res.StopsUndone+res.TrialStops != 2 {
		t.Errorf("stopped %d times, %d undone, %d tried", stops, res.StopsUndone, res.TrialStops)
	}
	// Each stop that is undone delays the next one: a round, then two.
	if len(res.Rounds) < 1+1+res.StopsUndone {
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
	if res := mig.Result(); res.StopsUndone != 4 || stops != 1+res.StopsUndone+res.TrialStops || res.DowntimeNote == "" {
		t.Errorf("stopped %d times, %d undone, %d tried, the note is %q", stops, res.StopsUndone, res.TrialStops, res.DowntimeNote)
	}
	if err := w.Err(); err != nil {
		t.Error(err)
	}
}
