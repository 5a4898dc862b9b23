package simtest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
)

// With every kind of log a measurement counts each page once, and turns the log off.
func TestMeasureDirtyRate(t *testing.T) {
	for name, l := range map[string]Layout{"get clears": {}, "manual": {ManualProtect: true}, "initially set": {ManualProtect: true, InitiallySet: true}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c := busyGuest(l)
			c.Punches = 0
			m, err := NewMachine(w, c)
			if err != nil {
				t.Fatal(err)
			}
			rate, err := migrate.MeasureDirtyRate(context.Background(), m, m, 10*time.Millisecond)
			if err != nil || rate.Pages != 0 || rate.RAMBytes != 1300*mempage.Size || len(rate.Samples) != 8 {
				t.Errorf("a guest that is paused: %+v, %v", rate, err)
			}
			if err := m.Resume(); err != nil {
				t.Fatal(err)
			}
			rate, err = migrate.MeasureDirtyRate(context.Background(), m, m, 200*time.Millisecond)
			if err != nil || rate.Pages == 0 || rate.Pages > 200 { // 100 of each slot
				t.Errorf("%+v, %v", rate, err)
			}
			for i := 1; i < len(rate.Samples); i++ {
				if rate.Samples[i].Pages < rate.Samples[i-1].Pages {
					t.Errorf("pages that were written are forgotten: %+v", rate.Samples)
				}
			}
			ctx, cancel := context.WithCancelCause(context.Background())
			enough := errors.New("enough")
			time.AfterFunc(time.Millisecond, func() { cancel(enough) })
			if _, err := migrate.MeasureDirtyRate(ctx, m, m, time.Minute); !errors.Is(err, enough) {
				t.Errorf("cancelled: %v", err)
			}
			if m.Logging() {
				t.Error("the log is still on")
			}
		})
	}
}

// An estimate migrates nothing, and predicts what the migration then takes, if a bandwidth
// limit determines that.
func TestEstimateMigration(t *testing.T) {
	w := newWorld(t)
	m := startTireless(t, w)
	addr, r := receiver(t, &Builder{World: w})
	o := slowly()
	o.BandwidthLimit, o.DowntimeLimit = 4<<20, 30*time.Second // 4 MiB are a second
	e, err := migrate.EstimateMigration(context.Background(), m, addr, o, 100*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if !e.Converges || e.Rounds != 1 || e.DataBytes > 1024*mempage.Size || e.DataBytes < 900*mempage.Size || e.Total < time.Second || w.Arrivals() != 0 || m.Logging() {
		t.Errorf("%+v, %d arrivals, logging: %v", e, w.Arrivals(), m.Logging())
	}
	o.DowntimeLimit = 20 * time.Millisecond
	if e, err := migrate.EstimateMigration(context.Background(), m, addr, o, 100*time.Millisecond); err != nil || e.Converges || e.Note == "" {
		t.Errorf("a guest that outruns the link: %+v, %v", e, err)
	}
	o.DowntimeLimit = 30 * time.Second
	mig := migrate.New(m, addr, o)
	if _, err := mig.Run(context.Background()); err != nil {
		t.Fatal(err)
	}
	<-r.Arrived()
	t.Logf("estimated %v and %d rounds; it took %v and %d", e.Total, e.Rounds, mig.Result().Total, len(mig.Result().Rounds)-1)
	if err := w.Err(); err != nil {
		t.Error(err)
	}
}
