package migrate

import (
	"slices"
	"time"

	"github.com/govmm/govmm/mempage"
)

// downtimeModel predicts the downtime from what has been measured: the throughput of
// the last rounds, and what earlier stops took.
type downtimeModel struct {
	window []roundSample // the last rounds, the oldest first
	rtt    time.Duration // the shortest that was seen

	cost  switchCost
	least switchCost // the least that was measured of each; meaningless before tries
	// flush is what flushing the disks took when little was left to flush.
	flush time.Duration
	// tries is how many stops have been measured: tried early, or undone.
	tries int
	// surge is how many pages were written between the last decision to stop and the
	// stop itself. Every round halves it.
	surge uint64
	// holdOff is how many rounds must pass before the next stop; failed is how many
	// stops were undone.
	holdOff, failed int
}

// roundSample is how much page content, before compression, a round moved from memory to
// memory.
type roundSample struct {
	bytes uint64
	d     time.Duration
}

// What a round must have moved for its throughput to be that of the link, and not of the
// scheduler of a busy host: significantBytes, or slowBytes if it took windowTime.
const (
	significantBytes = 1 << 20
	slowBytes        = 64 << 10
)

// tells reports whether the round's throughput is that of the link.
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

// The window has the last rounds that moved windowBytes or took windowTime: as few as
// possible without noise.
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

// startCost is assumed until something has been measured: about 1.5 times what a machine
// of a few vCPUs takes on a host that is not busy. Where only this assumption keeps a
// guest from being stopped, a stop is tried (see wantsTrial).
var startCost = switchCost{
	pause: time.Millisecond, save: 2 * time.Millisecond, sync: time.Millisecond,
	load: 4 * time.Millisecond, start: time.Millisecond, state: 32 << 10,
}

// times lists the durations of a cost.
func (c *switchCost) times() [5]*time.Duration {
	return [...]*time.Duration{&c.pause, &c.save, &c.sync, &c.load, &c.start}
}

// sum is the time of all that does not go over the wire.
func (c switchCost) sum() (d time.Duration) {
	for _, t := range c.times() {
		d += *t
	}
	return d
}

// fade halves the distance of each measured cost to what is usual, if it is above: a
// stop that took long once, on a busy host, must not prevent all later ones.
func (e *downtimeModel) fade() {
	usual := &startCost
	if e.tries > 0 {
		usual = &e.least
	}
	for i, now := range e.cost.times() {
		if u := *usual.times()[i]; *now > u {
			*now -= (*now - u) / 2
		}
	}
}

func newDowntimeModel(rtt time.Duration) *downtimeModel {
	return &downtimeModel{rtt: rtt, cost: startCost}
}

// echoed records how long a message and its answer took, which may have waited behind
// others.
func (e *downtimeModel) echoed(d time.Duration) { e.rtt = min(e.rtt, d) }

// round records a round. A round trip is subtracted, in which nothing moved: otherwise
// the short rounds of a guest that hardly writes would look like a slow link.
func (e *downtimeModel) round(bytes uint64, d time.Duration) {
	e.surge /= 2
	e.holdOff = max(0, e.holdOff-1)
	e.fade()
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

// unmeasured is the throughput that is assumed when no round had anything to move.
const unmeasured = 4 << 20

// throughput is in bytes of page content a second, over the window; 0 if there was no
// round yet.
func (e *downtimeModel) throughput() float64 {
	sum := roundSample{}.add(e.window)
	if sum.bytes == 0 && len(e.window) > 0 {
		return unmeasured
	}
	return float64(sum.bytes) / max(sum.d.Seconds(), 1e-6)
}

// transfer is the time for n bytes.
func (e *downtimeModel) transfer(n uint64) time.Duration {
	if n == 0 {
		return 0
	}
	seconds := float64(n) / max(e.throughput(), 1)
	return time.Duration(min(seconds, forever.Seconds()) * float64(time.Second))
}

// forever bounds an estimate.
const forever = 24 * time.Hour

// parts predicts the downtime, part by part, if the guest stops now with so many pages
// left.
func (e *downtimeModel) parts(pages uint64) Downtime {
	c := e.cost
	return Downtime{
		Pause: c.pause, State: c.save, LastSync: c.sync, Pages: e.transfer(pages * mempage.Size), Load: c.load, Resume: c.start, Yield: e.flush,
		// STATE to PREPARED, COMMIT to RUNNING.
		Wire: 2*e.rtt + e.transfer(uint64(c.state)),
	}
}

// downtime predicts the downtime with so many pages left, and with those that will be
// written before the vCPUs have stopped.
func (e *downtimeModel) downtime(pages uint64) time.Duration { return e.parts(pages + e.surge).Sum() }

// stopped predicts the downtime of a stop that has lasted for sofar already, with so
// many pages left and the state still to be saved.
func (e *downtimeModel) stopped(sofar time.Duration, pages uint64) time.Duration {
	d := e.parts(pages)
	d.Pause, d.LastSync = sofar, 0
	return d.Sum()
}

// measured learns from a stop that was undone what a stop costs: parts, how long the
// guest then took to run again, and how many bytes of state were saved; 0: none was.
func (e *downtimeModel) measured(parts Downtime, resume time.Duration, state int) {
	e.cost.pause, e.cost.sync = parts.Pause, parts.LastSync
	if state == 0 {
		return
	}
	// Loading makes as many system calls as saving, and some wait for other CPUs.
	e.cost.save, e.cost.state, e.cost.load, e.cost.start = parts.State, state, 2*parts.State, resume
	if e.tries == 0 {
		e.least = e.cost
	}
	for i, now := range e.cost.times() {
		least := e.least.times()[i]
		*least = min(*least, *now)
	}
	e.tries++
}

// gaveUp records a stop that was undone: expected pages were to be left when it was
// decided on, and found were. Stops that are undone one after another become rarer, since
// each costs the guest time.
func (e *downtimeModel) gaveUp(expected, found uint64) {
	if found > expected {
		e.surge = max(e.surge, found-expected)
	}
	e.failed++
	e.holdOff = e.failed
}

// tried records a stop that was made to measure it.
func (e *downtimeModel) tried() { e.holdOff = e.tries }

// maxTries is how many stops that would take too long are undone. The next one is not,
// so a migration ends even if the estimate is wrong every time; the result says what the
// stop took and why. It is also how often a stop is measured before it is believed that
// one without pages takes longer than the limit.
const maxTries = 4

// floor is the least that a stop with nothing left to send takes here.
func (e *downtimeModel) floor() time.Duration {
	c := e.cost
	if e.tries > 0 {
		c = e.least
	}
	return c.sum() + e.flush + 2*e.rtt + e.transfer(uint64(c.state))
}

// allowed is how long a stop may take: the limit, or, where no stop can be as short as
// that, the limit for the pages alone.
func (e *downtimeModel) allowed(limit time.Duration) time.Duration {
	floor := e.floor()
	if e.tries >= maxTries && floor > limit || floor-e.flush <= limit && floor > limit {
		return floor + limit
	}
	return limit
}

// mayTry reports whether the guest should be stopped now.
func (e *downtimeModel) mayTry(pages uint64, limit time.Duration) bool {
	return e.holdOff == 0 && e.downtime(pages) <= e.allowed(limit)
}

// wantsTrial reports whether a stop should be tried, to measure it: the pages fit the
// limit, and what a stop costs besides does not, as far as it is known.
func (e *downtimeModel) wantsTrial(pages uint64, limit time.Duration) bool {
	return e.holdOff == 0 && e.tries < maxTries && e.transfer((pages+e.surge)*mempage.Size) <= limit && !e.mayTry(pages, limit)
}
