package migrate

import (
	"fmt"
	"time"
)

// Downtime says where the time went in which the guest stood still, in
// milliseconds. The parts follow one another: their sum is
// [Result.DowntimeMS].
type Downtime struct {
	// PauseMS is from the word to stop until the last vCPU stands still and
	// the devices are quiet.
	PauseMS float64 `json:"pause_ms"`
	// LastSyncMS is the fetching of the dirty log.
	LastSyncMS float64 `json:"last_sync_ms"`
	// PagesMS is the writing of the last pages to the connections.
	PagesMS float64 `json:"pages_ms"`
	// StateMS is the saving of the machine's state, as far as the last pages
	// did not hide it.
	StateMS float64 `json:"state_ms"`
	// YieldMS is the flushing and unlocking of the disks at the source.
	YieldMS float64 `json:"yield_ms"`
	// LoadMS is the loading of the state, as the destination measured it.
	LoadMS float64 `json:"load_ms"`
	// ResumeMS is from COMMIT to vCPUs that run, as the destination measured it.
	ResumeMS float64 `json:"resume_ms"`
	// WireMS is the rest: bytes on their way and two round trips.
	WireMS float64 `json:"wire_ms"`
}

// milliseconds is a duration as results have it.
func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// duration is the way back.
func duration(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }

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
func (w *stopwatch) lap(part *float64) {
	now := time.Now()
	*part += milliseconds(now.Sub(w.last))
	w.last = now
}

// sofar is how long the guest has been standing still.
func (w *stopwatch) sofar() time.Duration { return time.Since(w.began) }

// finish ends the watch when RUNNING has come. What the destination says of
// itself cannot have taken longer than the time in which it was waited for.
func (w *stopwatch) finish() (total time.Duration, parts Downtime) {
	now := time.Now()
	p := w.parts
	waited := p.WireMS + milliseconds(now.Sub(w.last))
	p.LoadMS = min(max(p.LoadMS, 0), waited)
	p.ResumeMS = min(max(p.ResumeMS, 0), waited-p.LoadMS)
	p.WireMS = waited - p.LoadMS - p.ResumeMS
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
	worst, over := "", 0.0
	for _, c := range []struct {
		what           string
		took, expected float64
	}{
		{"stopping the vCPUs and devices", parts.PauseMS, p.parts.PauseMS},
		{"saving the state", parts.StateMS, p.parts.StateMS},
		{"the last sync of the dirty log", parts.LastSyncMS, p.parts.LastSyncMS},
		{"the last pages and their way", parts.PagesMS + parts.WireMS, p.parts.PagesMS + p.parts.WireMS},
		{"loading the state at the destination", parts.LoadMS, p.parts.LoadMS},
		{"flushing the disks", parts.YieldMS, p.parts.YieldMS},
		{"resuming there", parts.ResumeMS, p.parts.ResumeMS},
	} {
		if by := c.took - c.expected; worst == "" || by > over {
			over = by
			worst = fmt.Sprintf("%s took %.1f ms, %.1f were estimated", c.what, c.took, c.expected)
		}
	}
	return fmt.Sprintf("the guest stood still for %.1f ms, the limit was %v: %s", milliseconds(took), p.limit, worst)
}
