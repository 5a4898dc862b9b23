package migrate

import (
	"time"
)

// placeLimit bounds how long a source holds the one place that a receiver has for a
// migration, and does not use it: a live source could hold it for ever with an ALIVE now
// and then, or a byte. It counts only ticks in which the destination waits for the source.
type placeLimit struct {
	tick time.Duration // from one look to the next
	slow uint64        // fewer bytes in a window are none of a migration

	setup         int    // ticks before READY
	since         int    // ticks in this window
	bytes, frames uint64 // when it began
	slowOnes      int    // windows, one after another
	quietOnes     int
}

// In ticks: pulseTicks of them are the time-out, 10 s.
const (
	placeSetup  = 360 * pulseTicks // before READY: an hour
	placeWindow = 3 * pulseTicks
	maxSlow     = 2  // windows in which part of a frame comes: in one it may have begun
	maxQuiet    = 20 // windows in which nothing comes but ALIVE: 10 minutes
)

// newPlaceLimit makes the limit for a session with a time-out. A frame must come with
// 1 KiB/s, a tenth of 100 kbit/s.
func newPlaceLimit(timeout time.Duration) *placeLimit {
	tick := timeout / pulseTicks
	return &placeLimit{tick: tick, slow: uint64(1<<10*(placeWindow*tick).Seconds()) + 1}
}

// look is called at each tick, with how many bytes have come without ALIVE, and how many
// whole frames. ready says that pages may come.
func (l *placeLimit) look(ready, waits bool, bytes, frames uint64) error {
	if !waits {
		return nil
	}
	if !ready {
		if l.setup++; l.setup >= placeSetup {
			return openly("the configuration has not come in %v", placeSetup*l.tick)
		}
	}
	if l.since++; l.since < placeWindow {
		return nil
	}
	moved, whole := bytes-l.bytes, frames-l.frames
	l.since, l.bytes, l.frames = 0, bytes, frames
	switch {
	case whole > 0 || moved >= l.slow:
		l.slowOnes, l.quietOnes = 0, 0
	case moved > 0:
		l.slowOnes++
	default:
		l.quietOnes++
	}
	switch {
	case l.slowOnes >= maxSlow:
		return openly("only %d bytes have come in %v, and no whole frame", moved, placeWindow*l.tick)
	case l.quietOnes >= maxQuiet:
		return openly("the source has said for %v that it lives, and nothing else", maxQuiet*placeWindow*l.tick)
	}
	return nil
}
