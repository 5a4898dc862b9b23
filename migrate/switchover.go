package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// switchover stops the guest, sends all that is left, and the state, and takes the step
// to COMMIT. again is true if the guest runs on: since more was left than estimated and
// the stop would have exceeded the limit, or since it took too long (see guard.go).
//
// The state is saved and sent while the last pages are under way. Saving may write
// RAM (KVM does for some MSRs), so the last fetch of the dirty log comes after it,
// and what that finds is sent too (R5).
func (p *precopy) switchover(ctx context.Context) (again bool, err error) {
	p.flush.end()
	p.m.setPhase(PhaseSwitchover)
	p.hints.stop()
	expected := p.remaining() + p.model.surge
	if p.late {
		expected = p.disks.remaining()
	}
	p.expected = expectedStop{limit: p.m.opt.DowntimeLimit, floor: p.model.floor(), parts: p.model.parts(expected)}
	g := p.arm(ctx)
	defer g.disarm()
	ok, err := p.pause(ctx, g)
	if err != nil || !ok {
		return true, err
	}
	s := p.begin()
	sent := make(chan error, 1)
	go func() { sent <- p.send(ctx, g, s) }()
	select {
	case err = <-sent:
	case <-g.ctx.Done():
		// First the guest, then all else: a write to a link that has collapsed may take long.
		if err := p.halt(ctx, s); err != nil {
			<-sent
			return false, err
		}
		err = <-sent
	}
	if err == nil && p.stopped && p.m.opt.Snapshot == nil {
		err = p.commit(g)
	}
	tooMuch := (*tooMuchError)(nil)
	switch {
	case err == nil && p.stopped:
		return false, nil
	case context.Cause(ctx) != nil:
		return false, context.Cause(ctx)
	case errors.As(err, &tooMuch) && p.stopped:
		return true, p.goOn(ctx, expected, tooMuch)
	case !p.stopped && (err == nil || tooMuch != nil), errors.Is(err, errGuard), errors.Is(err, errHalted):
		return true, p.tookTooLong(ctx, g, s, nil)
	}
	return false, err
}

// commit gives up what only one side may hold, and takes the right to hand over.
func (p *precopy) commit(g *stopGuard) error {
	g.at("flushing the disks")
	err := p.m.src.YieldForHandoff(g.ctx)
	p.watch.lap(&p.watch.parts.Yield)
	if err != nil {
		if cause := context.Cause(g.ctx); cause != nil {
			return fmt.Errorf("%w: %w", cause, err)
		}
		return fmt.Errorf("give up the disks: %w", err)
	}
	return p.m.commit(g.ctx)
}

// send sends what is left, and waits until the destination is PREPARED. The guest may be
// let go on at any time meanwhile: then it ends with errHalted, or with what is wrong
// with the link, when what it was writing has been written.
func (p *precopy) send(ctx context.Context, g *stopGuard, s *stop) error {
	if p.late {
		return p.sendLate(ctx, g, s)
	}
	m := p.m
	g.at("fetching the dirty log")
	if err := p.sync(); err != nil {
		return err
	}
	if left := p.remaining(); !p.wasPaused && !p.resets && p.model.failed < maxTries &&
		p.model.stopped(p.watch.sofar(), left) > p.model.allowed(m.opt.DowntimeLimit) {
		return &tooMuchError{left}
	}
	early := !m.opt.VerifyPages
	m.meter.beginRound(s.round, p.tracker.Remaining())
	g.at("sending the last pages and the state")
	if err := s.unlessHalted(func() error {
		// The guest goes on at full speed, on whichever side.
		if err := p.release(); err != nil {
			return err
		}
		p.hints.done() // DONE is part of the state
		p.samples = m.sampleStorage(g.ctx)
		p.save(ctx, s, early)
		return nil
	}); err != nil {
		return err
	}
	err := p.disks.send(ctx, nil)
	if err == nil {
		err = p.sender.send(ctx, nil, nil)
	}
	p.watch.lap(&p.watch.parts.Pages)
	// Also after an error: while the state is saved the guest must not be resumed and
	// ABORT must not be sent.
	<-s.sent
	p.watch.lap(&p.watch.parts.State)
	p.watch.move(&p.watch.parts.State, &p.watch.parts.Storage, s.sampled)
	if err = errors.Join(err, s.err); err != nil {
		if cause := context.Cause(g.ctx); cause != nil {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return err
	}
	if s.isHalted() {
		return errHalted
	}
	before := p.tracker.Remaining()
	if err := p.sync(); err != nil { // R5: the last one
		return err
	}
	m.meter.dirtied(max(p.tracker.Remaining(), before) - before)
	return p.finish(ctx, g, s, early)
}

// finish sends what the last sync found, and the state if it has not been sent, and
// waits until the destination has loaded it.
func (p *precopy) finish(ctx context.Context, g *stopGuard, s *stop, stateSent bool) error {
	m := p.m
	if p.tracker.Remaining() > 0 && !p.late {
		// Some of them may have been sent since the last barrier.
		if err := p.link.fence(p.sender, s.round); err != nil {
			return err
		}
		if err := p.sender.send(ctx, nil, nil); err != nil {
			return err
		}
	}
	if err := s.unlessHalted(func() error {
		s.last = true
		return nil
	}); err != nil {
		return err
	}
	if err := p.link.endPages(p.sender, s.round); err != nil {
		return err
	}
	if m.opt.VerifyPages && !isClosed(p.dropped) {
		if err := p.sender.sendHashes(g.ctx, p.link.conn); err != nil {
			return err
		}
	}
	if !stateSent {
		if err := p.sendState(s); err != nil {
			return err
		}
	}
	m.meter.endRound()
	p.watch.lap(&p.watch.parts.Pages)
	g.at("waiting for the destination to load the state")
	r, err := p.link.await(g.ctx, framePrepared)
	if err != nil {
		return err
	}
	if r.first != s.number {
		return fmt.Errorf("%w: the destination is prepared for stop %d instead of %d", ErrProtocol, r.first, s.number)
	}
	p.watch.lap(&p.watch.parts.Wire) // with the loading, which is taken out at the end
	p.watch.parts.Load, p.watch.compared, err = decodeTook(r)
	return err
}

// sync fetches the dirty log while the guest stands still.
func (p *precopy) sync() error {
	defer p.watch.lap(&p.watch.parts.LastSync)
	return p.syncAll()
}

// save saves the state in the background, and sends it if it may overtake the last
// pages: the destination prepares it meanwhile, and loads it when they have landed.
// Nothing is written to the control connection before s.sent is closed.
func (p *precopy) save(ctx context.Context, s *stop, send bool) {
	s.saved, s.sent = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(s.sent)
		s.state, s.err = p.saveState(ctx)
		close(s.saved)
		began := time.Now()
		p.samples.wait()
		s.sampled = time.Since(began)
		if s.err == nil && send && !s.isHalted() {
			s.err = p.sendState(s)
		}
	}()
}

func (p *precopy) saveState(ctx context.Context) ([]byte, error) { return p.m.saveState(ctx) }

func (m *Migration) saveState(ctx context.Context) ([]byte, error) {
	state, err := m.src.SaveState(ctx)
	switch {
	case err != nil:
		err = fmt.Errorf("save the machine's state: %w", err)
	case len(state) > maxState:
		err = fmt.Errorf("the machine's state has %d bytes: must be at most %d", len(state), maxState)
	}
	return state, err
}

// sendState sends the samples of the storage, if there are any, and the state.
func (p *precopy) sendState(s *stop) error {
	s.stateSent = true
	if err := p.sendSamples(); err != nil {
		return err
	}
	h := header{typ: frameState, first: s.number}
	if p.wasPaused {
		h.flags |= flagPaused
	}
	if p.late {
		h.flags |= flagLater
	}
	return p.link.conn.writeFrame(h, s.state)
}
