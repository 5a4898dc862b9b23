package migrate

import (
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"pgregory.net/rapid"
)

// The window drops rounds as soon as younger ones are enough.
func TestThroughputIsOfTheLastRounds(t *testing.T) {
	e := newDowntimeModel(0)
	if got := e.transfer(1 << 20); got != forever {
		t.Errorf("1 MiB takes %v when nothing is known", got)
	}
	e.round(1<<30, 10*time.Second) // about 100 MiB/s
	if got := e.throughput() / (1 << 20); got < 102 || got > 103 {
		t.Errorf("%.1f MiB/s after one round", got)
	}
	e.round(4096, time.Millisecond) // says nothing by itself
	if got := e.throughput() / (1 << 20); got < 102 || got > 103 {
		t.Errorf("%.1f MiB/s after a round of one page", got)
	}
	e.round(windowBytes, 16*time.Millisecond)
	if got := e.throughput() / (1 << 20); got != 500 || len(e.window) != 1 {
		t.Errorf("%.1f MiB/s, %d rounds in the window", got, len(e.window))
	}
	e.round(1<<20, 2*windowTime)
	if got := e.throughput() / (1 << 20); got != 2 || len(e.window) != 1 {
		t.Errorf("a long round: %.1f MiB/s, %d rounds in the window", got, len(e.window))
	}
	// Rounds that moved nothing do not replace one that did.
	for range 5000 {
		e.round(0, windowTime)
	}
	if got := e.throughput() / (1 << 20); got != 2 {
		t.Errorf("%.1f MiB/s after rounds without pages", got)
	}
	if len(e.window) > windowBytes/significantBytes {
		t.Errorf("the window has %d rounds", len(e.window))
	}
	// A link that has become slow is noticed, if little is sent over it.
	e.round(100<<10, time.Second)
	if got := e.throughput() / (1 << 10); got != 100 {
		t.Errorf("%.1f KiB/s over a slow link", got)
	}
}

// A first answer that took long, and rounds that hardly moved anything, do not determine
// the estimate: a guest that does not write can always be migrated.
func TestIdleRoundsAreNoSlowLink(t *testing.T) {
	e := newDowntimeModel(160 * time.Millisecond) // the destination was busy
	e.round(16<<20, 200*time.Millisecond)
	for range 200 {
		e.echoed(10 * time.Millisecond)
		e.round(mempage.Size, 11*time.Millisecond)
		e.round(2*mempage.Size, 400*time.Millisecond) // a host that is busy
	}
	if got := e.downtime(1); got > 100*time.Millisecond {
		t.Errorf("a stop with one page left is estimated at %v", got)
	}
}

// A stop that was undone shows what a stop takes, and delays the next one.
func TestAStopGivenUpTeaches(t *testing.T) {
	e := newDowntimeModel(time.Millisecond)
	e.round(100<<20, time.Second)
	before := e.downtime(0)
	if before < 5*time.Millisecond || before > 20*time.Millisecond {
		t.Errorf("unmeasured, a stop without pages is estimated at %v", before)
	}
	limit := 40 * time.Millisecond
	if !e.mayTry(100, limit) {
		t.Fatal("100 pages at 100 MiB/s do not fit 40 ms")
	}
	if got := e.stopped(time.Millisecond, 2000); got < 78*time.Millisecond {
		t.Errorf("2000 pages at 100 MiB/s: %v", got)
	}
	e.gaveUp(100, 2000, Downtime{Pause: 3 * time.Millisecond, LastSync: 2 * time.Millisecond, State: 7 * time.Millisecond}, 5000)
	if c := e.cost; c.pause != 3*time.Millisecond || c.sync != 2*time.Millisecond || c.save != 7*time.Millisecond ||
		c.load != 14*time.Millisecond || c.state != 5000 || e.surge != 1900 {
		t.Errorf("learnt %+v, a surge of %d", e.cost, e.surge)
	}
	if e.mayTry(0, time.Hour) {
		t.Error("the next try comes without a round")
	}
	for range 20 {
		e.round(1<<20, 10*time.Millisecond)
	}
	e.gaveUp(0, 100, Downtime{}, 0)
	for range 20 {
		e.round(mempage.Size, time.Millisecond) // any round counts
	}
	if e.surge != 0 || !e.mayTry(0, time.Hour) {
		t.Errorf("20 rounds later: a surge of %d, hold-off %d", e.surge, e.holdOff)
	}
	// One that took long on a busy host does not prevent all later ones.
	e.gaveUp(0, 0, Downtime{Pause: 5 * time.Second, LastSync: 5 * time.Second, State: 5 * time.Second}, 5000)
	if e.downtime(0) < 10*time.Second {
		t.Errorf("15 s measured, %v believed", e.downtime(0))
	}
	for range 30 {
		e.round(1<<20, 10*time.Millisecond)
	}
	if !e.mayTry(0, limit) {
		t.Errorf("30 rounds later a stop is still estimated at %v", e.downtime(0))
	}
}

// Estimates are positive, bounded, and grow with what is left.
func TestEstimatesAreSane(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		e := newDowntimeModel(time.Duration(rapid.Int64Range(0, int64(time.Second)).Draw(t, "rtt")))
		for range rapid.IntRange(0, 10).Draw(t, "rounds") {
			e.round(rapid.Uint64Range(0, 1<<44).Draw(t, "bytes"), time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "took")))
		}
		pages := rapid.Uint64Range(0, 1<<40).Draw(t, "pages")
		d := e.downtime(pages)
		if d <= 0 || d > 3*forever {
			t.Fatalf("%d pages: %v", pages, d)
		}
		if more := e.downtime(pages + 1); more < d {
			t.Fatalf("a page more takes %v instead of %v", more, d)
		}
	})
}
