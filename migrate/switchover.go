package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// switchover stops the guest and sends all that is left, and the state. again is
// true if the guest runs on, since more was left than estimated and the stop would
// have exceeded the limit.
//
// The state is saved and sent while the last pages are under way. Saving may write
// RAM (KVM does for some MSRs), so the last fetch of the dirty log comes after it,
// and what that finds is sent too (R5).
func (p *precopy) switchover(ctx context.Context) (again bool, err error) {
	m, n := p.m, p.nextRound()
	p.flush.end()
	m.setPhase(PhaseSwitchover)
	p.hints.stop()
	expected := p.tracker.Remaining() + p.model.surge
	p.expected = expectedStop{limit: m.opt.DowntimeLimit, floor: p.model.floor(), parts: p.model.parts(expected)}
	p.watch = startWatch()
	p.stopped = true // even if it fails
	wasRunning, err := m.src.PauseForHandoff(ctx)
	p.watch.lap(&p.watch.parts.Pause)
	if err != nil {
		return false, fmt.Errorf("stop the guest: %w", err)
	}
	p.wasPaused = !wasRunning
	resets, err := p.resetting() // perhaps in this moment
	if err != nil {
		return false, err
	}
	if err := p.sync(); err != nil {
		return false, err
	}
	if left := p.tracker.Remaining(); wasRunning && !resets && p.model.failed < maxTries && p.model.stopped(p.watch.sofar(), left) > p.model.allowed(m.opt.DowntimeLimit) {
		return true, p.goOn(ctx, expected, left)
	}
	// The guest goes on at full speed, on whichever side.
	if err := p.release(); err != nil {
		return false, err
	}

	m.meter.beginRound(n, p.tracker.Remaining())
	p.hints.done() // DONE is part of the state
	early := !m.opt.VerifyPages
	p.samples = m.sampleStorage(ctx)
	saved := p.save(ctx, early)
	err = p.sender.send(ctx, nil, nil)
	p.watch.lap(&p.watch.parts.Pages)
	// Also after an error: while the state is saved the guest must not be resumed and
	// ABORT must not be sent.
	s := <-saved
	p.watch.lap(&p.watch.parts.State)
	p.watch.move(&p.watch.parts.State, &p.watch.parts.Storage, s.sampled)
	if err = errors.Join(err, s.err); err != nil {
		return false, err
	}
	before := p.tracker.Remaining()
	if err := p.sync(); err != nil { // R5: the last one
		return false, err
	}
	m.meter.dirtied(max(p.tracker.Remaining(), before) - before)
	if early {
		s.state = nil
	}
	return false, p.finish(ctx, n, s.state)
}

// finish sends what the last sync found, and the state if there is one that has
// not been sent, and waits until the destination has loaded it.
func (p *precopy) finish(ctx context.Context, n int, state []byte) error {
	m := p.m
	if p.tracker.Remaining() > 0 {
		// Some of them may have been sent since the last barrier.
		if err := p.link.fence(p.sender, n); err != nil {
			return err
		}
		if err := p.sender.send(ctx, nil, nil); err != nil {
			return err
		}
	}
	if err := p.link.endPages(p.sender, n); err != nil {
		return err
	}
	if m.opt.VerifyPages && !isClosed(p.dropped) {
		if err := p.sender.sendHashes(ctx, p.link.conn); err != nil {
			return err
		}
	}
	if state != nil {
		if err := p.sendState(state); err != nil {
			return err
		}
	}
	m.meter.endRound()
	p.watch.lap(&p.watch.parts.Pages)
	r, err := p.link.await(ctx, framePrepared)
	if err != nil {
		return err
	}
	p.watch.lap(&p.watch.parts.Wire) // with the loading, which is taken out at the end
	p.watch.parts.Load, p.watch.compared, err = decodeTook(r)
	return err
}

// sendState sends the samples of the storage, if there are any, and the state.
func (p *precopy) sendState(state []byte) error {
	if err := p.sendSamples(); err != nil {
		return err
	}
	h := header{typ: frameState}
	if p.wasPaused {
		h.flags |= flagPaused
	}
	return p.link.conn.writeFrame(h, state)
}

// sync fetches the dirty log while the guest stands still.
func (p *precopy) sync() error {
	defer p.watch.lap(&p.watch.parts.LastSync)
	return p.tracker.Sync()
}

// savedState is a machine's state, or why there is none.
type savedState struct {
	state   []byte
	err     error
	sampled time.Duration // how long the state waited for the samples of the storage
}

// save saves the state in the background, and sends it if it may overtake the last
// pages: the destination prepares it meanwhile, and loads it when they have landed.
// It sends exactly one value, and writes nothing to the control connection after it.
func (p *precopy) save(ctx context.Context, send bool) <-chan savedState {
	saved := make(chan savedState, 1)
	go func() {
		state, err := p.m.src.SaveState(ctx)
		began := time.Now()
		p.samples.wait()
		sampled := time.Since(began)
		switch {
		case err != nil:
			err = fmt.Errorf("save the machine's state: %w", err)
		case len(state) > maxState:
			err = fmt.Errorf("the machine's state has %d bytes: must be at most %d", len(state), maxState)
		case send:
			err = p.sendState(state)
		}
		saved <- savedState{state, err, sampled}
	}()
	return saved
}

// goOn undoes the stop. The first time it saves the state nevertheless, to learn its
// size and how long saving takes.
func (p *precopy) goOn(ctx context.Context, expected, left uint64) error {
	p.model.gaveUp(expected, left)
	if err := p.undo(ctx, p.model.tries == 0); err != nil {
		return err
	}
	p.m.setPhase(PhasePrecopy)
	p.m.meter.update(func(m *meter) { m.result.StopsUndone++ })
	return nil
}

// undo lets the guest go on and learns what the stop cost; if save is set, it saves the
// state before.
func (p *precopy) undo(ctx context.Context, save bool) error {
	var size int
	if save {
		s := <-p.save(ctx, false)
		if s.err != nil {
			return s.err
		}
		size = len(s.state)
		p.watch.lap(&p.watch.parts.State)
	}
	resumed := time.Now()
	p.stopped = false
	if err := p.m.src.ResumeAfterAbort(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("resume at the source: %w", err)
	}
	p.model.measured(p.watch.parts, time.Since(resumed), size)
	return nil
}

// trial stops the guest for as long as saving its state takes, and lets it go on: so what
// a stop costs here is measured, where the limit does not leave room for an assumption.
func (p *precopy) trial(ctx context.Context) error {
	p.watch = startWatch()
	p.stopped = true // even if it fails
	_, err := p.m.src.PauseForHandoff(ctx)
	p.watch.lap(&p.watch.parts.Pause)
	if err != nil {
		return fmt.Errorf("stop the guest: %w", err)
	}
	if err := p.sync(); err != nil {
		return err
	}
	if err := p.undo(ctx, true); err != nil {
		return err
	}
	p.model.tried()
	p.m.meter.update(func(m *meter) { m.result.TrialStops++ })
	return nil
}
