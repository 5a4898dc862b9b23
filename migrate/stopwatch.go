package migrate

import (
	"fmt"
	"time"
)

// stopwatch measures a stop of the guest; each lap is added to one part.
type stopwatch struct {
	began, last time.Time
	parts       Downtime
	compared    time.Duration // by the destination, after the pages had landed
}

func startWatch() *stopwatch {
	now := time.Now()
	return &stopwatch{began: now, last: now}
}

// lap adds the time since the last lap to a part.
func (w *stopwatch) lap(part *time.Duration) {
	now := time.Now()
	*part += now.Sub(w.last)
	w.last = now
}

// sofar is how long the guest has been stopped.
func (w *stopwatch) sofar() time.Duration { return time.Since(w.began) }

// move counts d of what a part has for another one.
func (w *stopwatch) move(from, to *time.Duration, d time.Duration) {
	d = min(d, *from)
	*from -= d
	*to += d
}

// finish ends the watch when RUNNING has come. What the destination measured is bounded
// by how long the source waited.
func (w *stopwatch) finish() (total time.Duration, parts Downtime) {
	now := time.Now()
	p := w.parts
	waited := p.Wire + now.Sub(w.last)
	p.Load = min(max(p.Load, 0), waited)
	p.Resume = min(max(p.Resume, 0), waited-p.Load)
	compared := min(w.compared, waited-p.Load-p.Resume)
	p.Storage += compared
	p.Wire = waited - p.Load - p.Resume - compared
	return now.Sub(w.began), p
}

// expectedStop is what a stop was expected to take.
type expectedStop struct {
	limit time.Duration
	floor time.Duration // what one with nothing left to send takes at least
	parts Downtime
}

// tolerated is how many times the limit a downtime may be without a note.
const tolerated = 1.2

// note says in one line why a downtime exceeded its limit: that no stop is as short here,
// or the part that exceeded its estimate by most. It is empty if the limit was kept.
func (e expectedStop) note(took time.Duration, parts Downtime) string {
	if float64(took) <= tolerated*float64(e.limit) {
		return ""
	}
	if e.floor > e.limit && took <= e.floor+e.limit {
		return fmt.Sprintf("the guest was stopped for %.1f ms, the limit was %v: with nothing left to send a stop takes about %.1f ms here%s",
			inMS(took), e.limit, inMS(e.floor), map[bool]string{true: ", most of it to flush the disks"}[e.parts.Yield > e.floor/2])
	}
	worst, over := "", time.Duration(0)
	for _, c := range []struct {
		what           string
		took, expected time.Duration
	}{
		{"stopping the vCPUs and devices", parts.Pause, e.parts.Pause},
		{"saving the state", parts.State, e.parts.State},
		{"the last sync of the dirty log", parts.LastSync, e.parts.LastSync},
		{"sending the last pages", parts.Pages + parts.Wire, e.parts.Pages + e.parts.Wire},
		{"loading the state at the destination", parts.Load, e.parts.Load},
		{"flushing the disks and comparing some blocks", parts.Storage, e.parts.Storage},
		{"flushing the disks", parts.Yield, e.parts.Yield},
		{"resuming at the destination", parts.Resume, e.parts.Resume},
	} {
		if by := c.took - c.expected; worst == "" || by > over {
			over = by
			worst = fmt.Sprintf("%s took %.1f ms, expected %.1f", c.what, inMS(c.took), inMS(c.expected))
		}
	}
	return fmt.Sprintf("the guest was stopped for %.1f ms, the limit was %v: %s", inMS(took), e.limit, worst)
}

func inMS(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
