package migrate

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A stop is undone, and the guest goes on at the source, when it takes much longer than
// it may: a device that does not get quiet, a link that collapses, a disk that is not
// flushed, a destination that does not load. Until COMMIT that is always possible: what
// was read while the guest stood still was armed before (R1), as in any round, and the
// destination forgets the state that it was sent when it is told so (UNDO).

// How long a stop may take before it is undone: a multiple of the limit, or of what it
// was expected to take (up to guardMost), but not less than some time. Each stop that was
// undone doubles it, up to four times, so that what takes longer on these hosts every time
// does not keep the guest for ever; no stop is without a bound.
const (
	guardMost    = time.Minute
	guardDoubled = 2 // times
	guardLongest = time.Minute
)

// guardTimes are what tests shorten.
type guardTimes struct {
	limits, expected time.Duration // multiples
	least            time.Duration
	// The next stop comes after a pause of so many times what this one took, and twice
	// that after the next one, up to guardLongest: a guest stands still for a small part
	// of the time.
	pauses time.Duration
}

var realGuard = guardTimes{limits: 4, expected: 2, least: 500 * time.Millisecond, pauses: 10}

var (
	errGuard  = errors.New("the stop took too long")
	errHalted = errors.New("the stop has been undone")
)

// stopGuard bounds one stop.
type stopGuard struct {
	ctx    context.Context // ends with errGuard as its cause, or with its parent
	cancel context.CancelCauseFunc
	timer  *time.Timer

	doingMu sync.Mutex // guards doing
	doing   string     // what the stop waits for
}

// arm begins to guard a stop.
func (p *precopy) arm(ctx context.Context) *stopGuard {
	times := p.m.guard
	expected := times.expected * max(p.model.floor(), p.expected.parts.Sum())
	patience := max(times.limits*p.m.opt.DowntimeLimit, min(expected, guardMost), times.least)
	patience = min(patience, forever) << min(p.tooLong, guardDoubled)
	if s := p.m.opt.Snapshot; s != nil {
		patience = max(patience, s.Patience)
	}
	g := &stopGuard{}
	g.ctx, g.cancel = context.WithCancelCause(ctx)
	g.timer = time.AfterFunc(patience, func() { g.cancel(errGuard) })
	return g
}

// disarm ends the guard. The context ends, too.
func (g *stopGuard) disarm() {
	g.timer.Stop()
	g.cancel(nil)
}

// at records what the stop waits for now.
func (g *stopGuard) at(doing string) {
	g.doingMu.Lock()
	defer g.doingMu.Unlock()
	g.doing = doing
}

// stop is one stop of the guest, after its vCPUs and devices stand still.
type stop struct {
	number uint64 // of the stop, in STATE, PREPARED, COMMIT and UNDO
	round  int

	haltMu sync.Mutex // guards halted, and is held over what must not follow it
	halted bool       // the guest has gone on, or is about to

	// saved is closed when the state has been saved: before, the guest must not go on.
	// sent is closed when it has been sent, too. Both are made by save, nil before.
	saved, sent chan struct{}
	state       []byte
	err         error
	sampled     time.Duration // how long the state waited for the samples of the storage

	stateSent, last bool // STATE, the last ROUND: may have been sent
}

// begin makes the record of a stop.
func (p *precopy) begin() *stop {
	p.stops++
	return &stop{number: p.stops, round: p.nextRound()}
}

// unlessHalted calls f, or fails if the guest goes on.
func (s *stop) unlessHalted(f func() error) error {
	s.haltMu.Lock()
	defer s.haltMu.Unlock()
	if s.halted {
		return errHalted
	}
	return f()
}

func (s *stop) isHalted() bool {
	s.haltMu.Lock()
	defer s.haltMu.Unlock()
	return s.halted
}

// pause stops vCPUs and devices. ok is false if they did not stop in time: then the
// guest runs on.
func (p *precopy) pause(ctx context.Context, g *stopGuard) (ok bool, err error) {
	p.watch = startWatch()
	p.stopped = true // even if it fails
	g.at("stopping the vCPUs and devices")
	wasRunning, err := p.m.src.PauseForHandoff(g.ctx)
	p.watch.lap(&p.watch.parts.Pause)
	late := errors.Is(err, errGuard) || errors.Is(err, context.DeadlineExceeded)
	switch {
	case err != nil && (!late || context.Cause(ctx) != nil):
		return false, fmt.Errorf("stop the guest: %w", err)
	case err != nil:
		if err := p.resume(ctx); err != nil {
			return false, err
		}
		return false, p.tookTooLong(ctx, g, nil, err)
	}
	p.wasPaused = !wasRunning
	if p.resets, err = p.resetting(); err != nil { // perhaps in this moment
		return false, err
	}
	if p.wasPaused || p.resets { // it has no downtime
		g.timer.Stop()
	}
	return true, nil
}

// halt lets the guest go on while the stop is under way. Afterwards no further page is
// picked; spans that were picked are sent in full.
func (p *precopy) halt(ctx context.Context, s *stop) error {
	s.haltMu.Lock()
	s.halted = true
	p.sender.halted.Store(true)
	s.haltMu.Unlock()
	if s.saved != nil {
		<-s.saved
	}
	return p.resume(ctx)
}

// resume lets the guest go on, whether or not ctx has ended.
func (p *precopy) resume(ctx context.Context) error {
	p.hints.undone()
	p.serving.disarm()
	p.stopped = false
	if err := p.m.src.ResumeAfterAbort(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("resume at the source: %w", err)
	}
	return nil
}

// tooMuchError says that the rest would take longer than the stop may.
type tooMuchError struct{ left uint64 } // pages

func (e *tooMuchError) Error() string { return fmt.Sprintf("%d pages are left", e.left) }

// goOn undoes a stop that would take too long. The first time it saves the state
// nevertheless, to learn its size and how long saving takes.
func (p *precopy) goOn(ctx context.Context, expected uint64, e *tooMuchError) error {
	p.model.gaveUp(expected, e.left)
	if err := p.measure(ctx, p.model.tries == 0); err != nil {
		return err
	}
	p.undone(fmt.Sprintf("%d pages were left, expected %d", e.left, expected))
	return nil
}

// measure lets the guest go on and learns what the stop cost; if save is set, it saves the
// state before.
func (p *precopy) measure(ctx context.Context, save bool) error {
	var state []byte
	if save {
		var err error
		if state, err = p.saveState(ctx); err != nil {
			return err
		}
		p.watch.lap(&p.watch.parts.State)
	}
	resumed := time.Now()
	if err := p.resume(ctx); err != nil {
		return err
	}
	p.model.measured(p.watch.parts, time.Since(resumed), len(state))
	return nil
}

// trial stops the guest for as long as saving its state takes, and lets it go on: so what
// a stop costs here is measured, where the limit does not leave room for an assumption.
func (p *precopy) trial(ctx context.Context) error {
	g := p.arm(ctx)
	defer g.disarm()
	if ok, err := p.pause(ctx, g); err != nil || !ok {
		return err
	}
	if err := p.sync(); err != nil {
		return err
	}
	if err := p.measure(ctx, true); err != nil {
		return err
	}
	p.model.tried()
	p.m.meter.update(func(m *meter) { m.result.TrialStops++ })
	return nil
}

// tookTooLong undoes a stop on the wire, and delays the next one. The guest runs, unless
// COMMIT came too late. s is nil if the guest never stood still.
func (p *precopy) tookTooLong(ctx context.Context, g *stopGuard, s *stop, why error) error {
	took := p.watch.sofar()
	p.m.meter.endRound()
	if p.stopped {
		if err := p.resume(ctx); err != nil {
			return err
		}
	}
	if s != nil {
		if err := p.forget(s); err != nil {
			return err
		}
	}
	p.tooLong++
	pause := min(p.m.guard.pauses*took<<min(p.tooLong-1, 10), guardLongest)
	p.notBefore = p.clock.now().Add(pause)
	p.model.cost.load = max(p.model.cost.load, p.watch.parts.Load)
	if p.brake.percent > 0 {
		if err := p.throttle(p.brake.percent); err != nil {
			return err
		}
	}
	note := fmt.Sprintf("it took %.0f ms: %s", inMS(took), g.doing)
	if why != nil {
		note += ": " + why.Error()
	}
	p.undone(note)
	return nil
}

// forget tells the destination that what it was sent of a stop does not count, and makes
// what follows land after it.
func (p *precopy) forget(s *stop) error {
	p.sender.halted.Store(false)
	p.link.forgotten = s.number
	if s.stateSent || s.last {
		h := header{typ: frameUndo, first: s.number}
		if s.last {
			h.flags |= flagLast
		}
		p.link.flushed.Store(false)
		if err := p.link.conn.writeFrame(h); err != nil {
			return p.link.explain(err)
		}
	}
	if s.last {
		return nil // the last ROUND is a barrier
	}
	return p.link.fence(p.sender, s.round)
}

// undone records a stop that was undone.
func (p *precopy) undone(why string) {
	p.m.setPhase(PhasePrecopy)
	p.m.meter.update(func(m *meter) {
		m.result.StopsUndone++
		m.result.UndoneNote = why
	})
}
