package simtest

import (
	"context"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
)

// within migrates a guest that writes all the time, under a limit.
func within(b *testing.B, limit time.Duration) migrate.Result {
	w := NewWorld()
	w.Unchecked = true
	defer w.Close()
	m, err := NewMachine(w, Config{Layout: Layout{ManualProtect: true, InitiallySet: true, Slots: []migrate.Slot{{Pages: 8192}}},
		CPUs: 2, Seed: 7, Dirty: 2048, Rate: 20000, Fill: 8192})
	if err != nil {
		b.Fatal(err)
	}
	if err := m.Resume(); err != nil {
		b.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := migrate.NewReceiver(&Builder{World: w}, nil)
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, ln) }()
	defer func() {
		cancel()
		<-served
	}()
	o := migrate.DefaultOptions()
	o.DowntimeLimit = limit
	mig := migrate.New(m, ln.Addr().String(), o)
	if _, err := mig.Run(context.Background()); err != nil {
		b.Fatal(err)
	}
	<-r.Arrived()
	if err := w.Err(); err != nil {
		b.Fatal(err)
	}
	return mig.Result()
}

// BenchmarkDowntimeLimit migrates a guest that writes all the time, and reports how many
// migrations kept 1.2 times their limit, and how many of the others have no note. The
// machine is simulated; pages and time are real. It needs about -benchtime 100x.
func BenchmarkDowntimeLimit(b *testing.B) {
	for _, limit := range []time.Duration{20 * time.Millisecond, 100 * time.Millisecond} {
		b.Run(limit.String(), func(b *testing.B) {
			var took []float64
			kept, silent, undone := 0, 0, 0
			for b.Loop() {
				r := within(b, limit)
				if r.DowntimeNote != "" {
					b.Logf("%d: %s", len(took), r.DowntimeNote)
				}
				took = append(took, float64(r.Downtime.Microseconds())/1000)
				undone += r.StopsUndone
				switch {
				case float64(r.Downtime) <= 1.2*float64(limit):
					kept++
				case r.DowntimeNote == "":
					silent++
				}
			}
			slices.Sort(took)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(100*float64(kept)/float64(len(took)), "%-within")
			b.ReportMetric(float64(silent), "silent")
			b.ReportMetric(float64(undone)/float64(len(took)), "stops-undone")
			b.ReportMetric(took[len(took)/2], "median-ms")
			b.ReportMetric(took[len(took)-1], "longest-ms")
		})
	}
}
