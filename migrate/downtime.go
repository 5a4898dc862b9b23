package migrate

import (
	"fmt"
	"time"
)

// stopwatch measures a stop of the guest: each lap goes to one part.
type stopwatch struct {
	began, last time.Time
	parts       Downtime
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

// sofar is how long the guest has been standing still.
func (w *stopwatch) sofar() time.Duration { return time.Since(w.began) }

// finish ends the watch when RUNNING has come. What the destination says of
// itself cannot have taken longer than the time in which it was waited for.
func (w *stopwatch) finish() (total time.Duration, parts Downtime) {
	now := time.Now()
	p := w.parts
	waited := p.Wire + now.Sub(w.last)
	p.Load = min(max(p.Load, 0), waited)
	p.Resume = min(max(p.Resume, 0), waited-p.Load)
	p.Wire = waited - p.Load - p.Resume
	return now.Sub(w.began), p
}

// plan is what a stop was expected to take when it was decided on.
type plan struct {
	limit time.Duration
	parts Downtime // PagesMS has the pages' way as well
}

// tolerated is how much longer than the limit a downtime may be without a word.
const tolerated = 1.2

// note says why a downtime broke its limit, in one line, or nothing if it did
// not: the part that exceeded its estimate by most.
func (p plan) note(took time.Duration, parts Downtime) string {
	if float64(took) <= tolerated*float64(p.limit) {
		return ""
	}
	worst, over := "", time.Duration(0)
	for _, c := range []struct {
		what           string
		took, expected time.Duration
	}{
		{"stopping the vCPUs and devices", parts.Pause, p.parts.Pause},
		{"saving the state", parts.State, p.parts.State},
		{"the last sync of the dirty log", parts.LastSync, p.parts.LastSync},
		{"the last pages and their way", parts.Pages + parts.Wire, p.parts.Pages + p.parts.Wire},
		{"loading the state at the destination", parts.Load, p.parts.Load},
		{"flushing the disks", parts.Yield, p.parts.Yield},
		{"resuming there", parts.Resume, p.parts.Resume},
	} {
		if by := c.took - c.expected; worst == "" || by > over {
			over = by
			worst = fmt.Sprintf("%s took %.1f ms, %.1f were estimated", c.what, inMS(c.took), inMS(c.expected))
		}
	}
	return fmt.Sprintf("the guest stood still for %.1f ms, the limit was %v: %s", inMS(took), p.limit, worst)
}

func inMS(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
