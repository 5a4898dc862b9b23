package migrate

import (
	"context"
	"time"
)

// clock is time as a migration's rounds see it; tests have their own.
type clock struct {
	now   func() time.Time
	after func(time.Duration) <-chan time.Time
}

var realClock = clock{now: time.Now, after: time.After}

// Rounds that do not lead to a stop and hardly send anything follow each other after a
// pause, which grows: a guest that writes nothing takes neither processor nor link.
const (
	shortPause = 5 * time.Millisecond
	longPause  = 200 * time.Millisecond
)

// pace is the pause between rounds.
type pace struct{ pause time.Duration }

// next returns the pause before the next round; idle says that this round would hardly
// send anything, or that it cannot lead to a stop yet.
func (p *pace) next(idle bool) time.Duration {
	if !idle {
		p.pause = 0
		return 0
	}
	p.pause = min(max(2*p.pause, shortPause), longPause)
	return p.pause
}

// flushing is the flush of the disks that precedes a stop, so that little is left to
// flush while the guest stands still. It runs in the background: rounds go on, and a disk
// that takes minutes, or never answers, delays the stop and nothing else.
type flushing struct {
	src interface {
		PrepareStop(context.Context) error
	}
	clock clock

	running chan struct{} // closed when the flush has ended; nil: none is under way
	cancel  context.CancelFunc
	err     error // of the one that has ended
	began   time.Time
	ended   time.Time // zero: none has ended, or what it did was too long ago
	took    time.Duration
	before  time.Duration // what the flush before it took, of those that follow each other
	times   int           // that follow each other
}

const (
	// maxFlushes bounds the flushes before one stop: each has what was written during the
	// one before, as rounds do with memory.
	maxFlushes = 5
	// flushFresh is how long a flush counts, at least; a long one counts for twice its time,
	// and one that ended during the last round counts.
	flushFresh = time.Second
)

// done is closed when the flush under way has ended; nil: there is none.
func (f *flushing) done() <-chan struct{} { return f.running }

// start begins a flush, unless one is under way.
func (f *flushing) start(ctx context.Context) {
	if f.running != nil {
		return
	}
	running := make(chan struct{})
	f.began, f.running = f.clock.now(), running
	ctx, f.cancel = context.WithCancel(ctx)
	go func() {
		defer close(running)
		f.err = f.src.PrepareStop(ctx)
	}()
}

// end waits for the flush under way, which it cancels.
func (f *flushing) end() {
	if f.running != nil {
		f.cancel()
		<-f.running
		f.running = nil
	}
}

// ready reports whether the disks have been flushed so that another flush would gain
// nothing: what is left takes at most enough, or no less than before. The last round began
// at round.
func (f *flushing) ready(enough time.Duration, round time.Time) (bool, error) {
	if f.running != nil {
		select {
		case <-f.running:
		default:
			return false, nil
		}
		f.end()
		f.ended = f.clock.now()
		f.before, f.took = f.took, f.ended.Sub(f.began)
		f.times++
		if f.err != nil {
			return false, f.err
		}
	}
	if f.ended.IsZero() {
		return false, nil
	}
	if f.ended.Before(round) && f.clock.now().Sub(f.ended) > max(flushFresh, 2*f.took) {
		f.ended, f.times = time.Time{}, 0
		return false, nil
	}
	return f.took <= enough || f.times >= maxFlushes || f.times > 1 && f.took > f.before/2, nil
}
