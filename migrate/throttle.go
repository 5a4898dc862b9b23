package migrate

import "time"

const (
	throttleFirst = 20 // percent
	throttleStep  = 10
	throttleMost  = 99
	// throttlePause is the least time between two steps: a step must have had
	// the time to show in what the guest writes.
	throttlePause = 100 * time.Millisecond
	// stallRounds is how many rounds in a row must not have shrunk.
	stallRounds = 2
)

// brake decides when the guest is slowed down further.
type brake struct {
	percent int
	stalled int
	since   time.Time // of the last step
}

// round looks at one more round, which had began pages to send when it began
// and left as many as left when it ended, and says whether to raise percent. A
// round that leaves no more than half of what it had shrinks well enough.
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
