package migrate

import "time"

const (
	throttleFirst = 20 // percent
	throttleStep  = 10
	throttleMost  = 99
	// throttlePause is the least time between two steps, so that the effect of a step
	// on what the guest writes can be seen.
	throttlePause = 100 * time.Millisecond
	// stallRounds is how many rounds in a row must not shrink.
	stallRounds = 2
)

// brake decides when the guest is slowed down further.
type brake struct {
	percent int
	stalled int
	since   time.Time // of the last step
}

// round takes one more round, which began with began pages to send and ended with left,
// and reports whether percent was raised. A round that leaves at most half of its pages
// shrinks well enough.
func (b *brake) round(began, left uint64, now time.Time) (raise bool) {
	if left <= began/2 {
		b.stalled = 0
		return false
	}
	b.stalled++
	if b.stalled < stallRounds || b.percent >= throttleMost || now.Sub(b.since) < throttlePause {
		return false
	}
	b.stalled = 0
	b.since = now
	if b.percent == 0 {
		b.percent = throttleFirst
	} else {
		b.percent = min(b.percent+throttleStep, throttleMost)
	}
	return true
}
