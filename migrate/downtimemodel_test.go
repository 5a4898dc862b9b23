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
	e.gaveUp(100, 2000)
	e.measured(Downtime{Pause: 3 * time.Millisecond, LastSync: 2 * time.Millisecond, State: 7 * time.Millisecond}, time.Millisecond, 5000)
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
	e.gaveUp(0, 100)
	for range 20 {
		e.round(mempage.Size, time.Millisecond) // any round counts
	}
	if e.surge != 0 || !e.mayTry(0, time.Hour) {
		t.Errorf("20 rounds later: a surge of %d, hold-off %d", e.surge, e.holdOff)
	}
	// One that took long on a busy host does not prevent all later ones.
	e.gaveUp(0, 0)
	e.measured(Downtime{Pause: 5 * time.Second, LastSync: 5 * time.Second, State: 5 * time.Second}, 5*time.Second, 5000)
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

// A guest of which nothing had to be sent, since it is all zeros, or free, can be stopped.
func TestNothingWasMoved(t *testing.T) {
	e := newDowntimeModel(0)
	e.round(0, 100*time.Microsecond)
	if got := e.downtime(0); got > 20*time.Millisecond || !e.mayTry(0, 20*time.Millisecond) {
		t.Errorf("a stop takes %v", got)
	}
	e.round(1<<20, 10*time.Second) // of what it writes then
	if got := e.throughput(); got != 1<<20/10. {
		t.Errorf("%.0f bytes/s", got)
	}
}

// small is what a stop costs on a small machine.
var small = Downtime{Pause: 200 * time.Microsecond, LastSync: 100 * time.Microsecond, State: 600 * time.Microsecond}

// Where only assumptions stand against a stop, it is tried; what that measures counts.
func TestAStopIsMeasured(t *testing.T) {
	e := newDowntimeModel(100 * time.Microsecond)
	e.round(1<<30, time.Second)
	const limit = 5 * time.Millisecond
	if e.mayTry(0, limit) || !e.wantsTrial(0, limit) || e.wantsTrial(0, time.Second) || e.wantsTrial(1<<20, limit) {
		t.Fatalf("nothing measured: may be tried: %v, wants a trial: %v", e.mayTry(0, limit), e.wantsTrial(0, limit))
	}
	e.measured(small, 300*time.Microsecond, 9000)
	e.tried()
	if e.mayTry(0, limit) || e.wantsTrial(0, limit) {
		t.Error("the round after the trial is left out")
	}
	e.round(0, 0)
	if !e.mayTry(0, limit) || e.mayTry(4000, limit) {
		t.Errorf("measured: a stop takes %v", e.downtime(0))
	}
}

// No stop is as short as the limit: when it has been measured maxTries times, the limit is
// for the pages.
func TestALimitThatNoStopCanKeep(t *testing.T) {
	e := newDowntimeModel(100 * time.Microsecond)
	e.round(1<<30, time.Second)
	const limit = time.Millisecond
	rounds := 0
	for ; !e.mayTry(100, limit); rounds++ {
		if rounds > 100 {
			t.Fatalf("not stopped after %d trials", e.tries)
		}
		if e.wantsTrial(100, limit) {
			e.measured(small, 300*time.Microsecond, 9000)
			e.tried()
		}
		e.round(0, 0)
	}
	if e.tries != maxTries || rounds < 1+2+3+4 {
		t.Errorf("%d trials in %d rounds", e.tries, rounds)
	}
	if e.mayTry(512, limit) {
		t.Error("2 MiB at 1 GiB/s fit 1 ms")
	}
	if got := e.allowed(time.Second); got != time.Second {
		t.Errorf("a limit of a second became %v", got)
	}
}

// A disk that is never clean does not prevent the stop; what flushing it takes is expected.
func TestAFlushThatTakesLongerThanTheLimit(t *testing.T) {
	e := newDowntimeModel(0)
	e.round(1<<30, time.Second)
	e.flush = 600 * time.Millisecond
	const limit = 300 * time.Millisecond
	if !e.mayTry(0, limit) || e.mayTry(1<<18, limit) || e.parts(0).Yield != e.flush {
		t.Errorf("a stop takes %v, allowed are %v", e.downtime(0), e.allowed(limit))
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
