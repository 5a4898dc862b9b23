package migrate

import (
	"slices"
	"time"

	"github.com/govmm/govmm/mempage"
)

// estimator foretells the downtime from what has been measured: the
// throughput of the last rounds, and what earlier tries to stop took.
type estimator struct {
	window []roundSample // the last rounds, the oldest first
	rtt    time.Duration // the shortest that was seen

	cost switchCost
	// surge is how many pages were written between the last decision to stop
	// and the stop itself; it is halved with every round since.
	surge uint64
	// holdOff is how many rounds must pass before the next try, failed how
	// many tries were given up.
	holdOff, failed int
}

// roundSample is what a round moved: content of pages, before compression,
// from memory to memory.
type roundSample struct {
	bytes uint64
	d     time.Duration
}

// What a round must have moved for its throughput to be that of the link, and
// not of how long a goroutine waits for its turn on a busy host: so many bytes,
// or so many if it took long.
const (
	significantBytes = 1 << 20
	slowBytes        = 64 << 10
)

// tells says whether a round's throughput is worth believing.
func (s roundSample) tells() bool {
	return s.bytes >= significantBytes || s.bytes >= slowBytes && s.d >= windowTime
}

// add returns the sum of s and others.
func (s roundSample) add(others []roundSample) roundSample {
	for _, o := range others {
		s.bytes += o.bytes
		s.d += o.d
	}
	return s
}

// The window is as short as it can be without its figure being noise: it ends
// where the rounds in it have moved so much or lasted so long.
const (
	windowBytes = 8 << 20
	windowTime  = 250 * time.Millisecond
)

// switchCost is what a stop takes besides the pages.
type switchCost struct {
	pause, save, sync time.Duration // at the source
	load, start       time.Duration // at the destination
	state             int           // bytes
}

// startCost is believed until something has been measured: about what a
// machine of a few vCPUs takes on a host that is not busy, and half as much
// again. A limit that this breaks by itself would be given up unheard.
var startCost = switchCost{
	pause: time.Millisecond, save: 2 * time.Millisecond, sync: time.Millisecond,
	load: 4 * time.Millisecond, start: time.Millisecond, state: 32 << 10,
}

// fade halves what a cost was measured above the cost that is believed without
// measuring: a stop that once took long because the host was busy does not
// rule out all later ones.
func (c *switchCost) fade() {
	for _, d := range []struct{ now, usual *time.Duration }{
		{&c.pause, &startCost.pause}, {&c.save, &startCost.save}, {&c.sync, &startCost.sync},
		{&c.load, &startCost.load}, {&c.start, &startCost.start},
	} {
		if *d.now > *d.usual {
			*d.now -= (*d.now - *d.usual) / 2
		}
	}
}

func newEstimator(rtt time.Duration) *estimator {
	return &estimator{rtt: rtt, cost: startCost}
}

// echoed takes how long a message and its answer took, perhaps behind others.
// The first of a connection may have waited for a peer that was busy.
func (e *estimator) echoed(d time.Duration) { e.rtt = min(e.rtt, d) }

// round takes a round's measure. A round trip of it moved nothing: it must not
// make the rounds of a guest that hardly writes look like a slow link.
func (e *estimator) round(bytes uint64, d time.Duration) {
	e.surge /= 2
	e.holdOff = max(0, e.holdOff-1)
	e.cost.fade()
	d -= min(d, e.rtt)
	sample := roundSample{bytes, d}
	if !sample.tells() {
		if len(e.window) == 0 || !e.window[0].tells() { // better than nothing
			e.window = append(e.window[:0], sample.add(e.window))
		}
		return
	}
	if len(e.window) > 0 && !e.window[0].tells() {
		e.window = e.window[:0]
	}
	e.window = append(e.window, sample)
	var sum roundSample
	for i, s := range slices.Backward(e.window) {
		sum.bytes += s.bytes
		sum.d += s.d
		if sum.bytes >= windowBytes || sum.d >= windowTime && sum.bytes > 0 {
			e.window = e.window[i:]
			return
		}
	}
}

// throughput is bytes of page content a second over the window, 0 if nothing
// has been moved yet.
func (e *estimator) throughput() float64 {
	sum := roundSample{}.add(e.window)
	return float64(sum.bytes) / max(sum.d.Seconds(), 1e-6)
}

// transfer is the time for n bytes.
func (e *estimator) transfer(n uint64) time.Duration {
	if n == 0 {
		return 0
	}
	seconds := float64(n) / max(e.throughput(), 1)
	return time.Duration(min(seconds, forever.Seconds()) * float64(time.Second))
}

// forever bounds an estimate: what would take longer is not different.
const forever = 24 * time.Hour

// plan is the downtime, part by part, if the guest stopped now with so many
// pages left.
func (e *estimator) plan(pages uint64) Downtime {
	c := e.cost
	return Downtime{
		Pause: c.pause, State: c.save, LastSync: c.sync, Pages: e.transfer(pages * mempage.Size), Load: c.load, Resume: c.start,
		// STATE to PREPARED, COMMIT to RUNNING.
		Wire: 2*e.rtt + e.transfer(uint64(c.state)),
	}
}

// downtime is the estimate with so many pages left, and with those that will
// be written before the vCPUs stand still.
func (e *estimator) downtime(pages uint64) time.Duration { return e.plan(pages + e.surge).Sum() }

// stopped is what is expected to follow a stop that has lasted for so long
// already, with so many pages left and the state still to be saved.
func (e *estimator) stopped(sofar time.Duration, pages uint64) time.Duration {
	d := e.plan(pages)
	d.Pause, d.LastSync = sofar, 0
	return d.Sum()
}

// gaveUp learns from a try that was undone: expected pages were to be left
// when it was decided on, there were found; what was measured replaces what
// was believed. Tries that fail one after another get rarer: each costs the
// guest a stop.
func (e *estimator) gaveUp(expected, found uint64, parts Downtime, state int) {
	if found > expected {
		e.surge = max(e.surge, found-expected)
	}
	e.failed++
	e.holdOff = e.failed
	e.cost.pause, e.cost.sync = parts.Pause, parts.LastSync
	if state > 0 {
		e.cost.save, e.cost.state = parts.State, state
		// Loading is as many system calls as saving, and some of them wait for
		// other CPUs.
		e.cost.load = max(e.cost.load, 2*e.cost.save)
	}
}

// maxTries is how often a stop that would take too long is undone. A guest, or a
// host, that makes the estimate wrong every time is handed over in the end, and
// the result says what it took and why.
const maxTries = 4

// mayTry says whether the guest should be stopped now.
func (e *estimator) mayTry(pages uint64, limit time.Duration) bool {
	return e.holdOff == 0 && e.downtime(pages) <= limit
}
