package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A guest that changes its process on one host ([Options.SharedMemory]) takes its memory
// along: both processes map it, and no page is sent. There are no rounds and no dirty log.
// The guest stops, its state goes over, and the same handoff decides who runs it. Until
// COMMIT the destination does not write the memory, so the guest can go on at the source
// at any moment.
//
// One stop is tried. Where it takes too long, or anything else fails, the migration ends:
// there is nothing that a second one would find better prepared.

// featureShared is named by a source whose destination has got the guest's memory by
// another way than this connection, and known by a destination whose [Builder] is a
// [Sharer].
const featureShared = "shared-memory"

// Sharer is a [Builder] that can make a machine around the memory of the source, which it
// has been given besides.
type Sharer interface {
	Builder
	// BuildShared is Build for such a machine. The source's guest runs in that memory:
	// before Start nothing writes it, and neither Discard nor Zero gives it back to the host.
	BuildShared(ctx context.Context, config []byte) (Target, error)
}

// Referee decides who has the right to run where both sides can reach what it decides by,
// such as a word in memory that they share. A source that has one never has to wait for a
// verdict, also if its peer has died.
type Referee interface {
	// TakeBack takes back the right to run, and reports whether it could: the destination
	// has not taken the right, and never will. It is called after COMMIT was sent and no
	// answer came.
	TakeBack() bool
}

// sharedPatience is how many times the downtime limit the stop of a guest whose memory is
// shared may take, and sharedLeast the least that it may: this host may be busy.
const (
	sharedPatience = 8
	sharedLeast    = 2 * time.Second
)

// sharedBuild is the builder's method for the memory that the source has named.
func (r *Receiver) sharedBuild(shared bool) func(context.Context, []byte) (Target, error) {
	if s, ok := r.builder.(Sharer); ok && shared {
		return s.BuildShared
	}
	return r.builder.Build
}

// sharedStop is the stop of a guest whose memory is shared.
type sharedStop struct {
	m         *Migration
	link      *link
	watch     *stopwatch
	wasPaused bool
	saved     chan struct{} // closed when the state was saved, or could not be
}

// handOverShared is all of a migration after the connection, if the memory is shared. The
// guest is not reset here meanwhile: its memory would be another.
func (m *Migration) handOverShared(base context.Context, l *link) error {
	m.resets.resetMu.Lock()
	defer m.resets.resetMu.Unlock()
	msg, err := m.describe()
	if err == nil {
		err = m.announce(l.ctx, l, msg)
	}
	if err == nil {
		err = m.src.PrepareStop(l.ctx)
	}
	if err != nil {
		return l.end(err)
	}
	m.meter.update(func(mt *meter) { mt.result.Setup = time.Since(mt.started) })
	m.setPhase(PhaseSwitchover)
	s := &sharedStop{m: m, link: l, watch: startWatch(), saved: make(chan struct{})}
	if err := s.prepare(); err != nil {
		err = l.explain(err)
		back := s.resume(base) // first the guest, then the peer
		if back == nil {
			return l.end(err)
		}
		return l.end(errors.Join(err, back))
	}
	running, why := m.decide(base, l, 1, s.watch)
	if !running {
		err := fmt.Errorf("the destination gave the right to run back, the guest goes on here: %w", why)
		return errors.Join(err, s.resume(base))
	}
	took, parts := s.watch.finish()
	m.meter.update(func(mt *meter) {
		mt.result.Downtime, mt.result.DowntimeParts = took, parts
		mt.result.Total = time.Since(mt.started)
	})
	return nil
}

// prepare stops the guest and returns when the destination is PREPARED and COMMIT may be
// sent. After an error the guest stands still, and goes on by resume.
func (s *sharedStop) prepare() error {
	m := s.m
	ctx, cancel := context.WithTimeoutCause(s.link.ctx, max(sharedPatience*m.opt.DowntimeLimit, sharedLeast), errGuard)
	defer cancel()
	wasRunning, err := m.src.PauseForHandoff(ctx)
	s.watch.lap(&s.watch.parts.Pause)
	if err != nil {
		close(s.saved)
		return fmt.Errorf("stop the guest: %w", err)
	}
	s.wasPaused = !wasRunning
	if r, ok := m.src.(Resetter); ok && isClosed(r.ResetRequested()) { // perhaps in this moment
		close(s.saved)
		return errResetHere
	}
	sent := make(chan error, 1)
	go func() { sent <- s.send(ctx) }()
	select {
	case err = <-sent:
	case <-ctx.Done():
		// A write may hang, and the guest does not wait for it.
		<-s.saved
		err = context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	err = m.src.YieldForHandoff(ctx)
	s.watch.lap(&s.watch.parts.Yield)
	if err != nil {
		return fmt.Errorf("give up what only one side may hold: %w", err)
	}
	return m.commit(ctx)
}

// send saves the state, sends it, and waits until it is loaded.
func (s *sharedStop) send(ctx context.Context) error {
	state, err := s.m.saveState(ctx)
	close(s.saved)
	if err != nil {
		return err
	}
	h := header{typ: frameState, first: 1}
	if s.wasPaused {
		h.flags |= flagPaused
	}
	if err := s.link.conn.writeFrame(h, state); err != nil {
		return err
	}
	s.watch.lap(&s.watch.parts.State)
	r, err := s.link.await(ctx, framePrepared)
	if err != nil {
		return err
	}
	if r.first != 1 {
		return fmt.Errorf("%w: the destination is prepared for stop %d instead of 1", ErrProtocol, r.first)
	}
	s.watch.lap(&s.watch.parts.Wire) // with the loading, which is taken out at the end
	s.watch.parts.Load, s.watch.compared, err = decodeTook(r)
	return err
}

// resume lets the guest go on here, whether or not ctx has ended.
func (s *sharedStop) resume(ctx context.Context) error {
	if err := s.m.src.ResumeAfterAbort(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("resume at the source: %w", err)
	}
	return nil
}

// decide sends COMMIT, and returns when it is known whether the guest runs at the
// destination. If it does not, why says so; only without a [Referee] may that not be
// known ([ErrHandoffUnknown]).
func (m *Migration) decide(base context.Context, l *link, stop uint64, watch *stopwatch) (running bool, why error) {
	running, why = m.sendCommit(l, stop, watch)
	l.close()
	if running || errors.As(why, new(*failedError)) {
		return running, why
	}
	if m.opt.Referee != nil {
		if m.opt.Referee.TakeBack() {
			return false, why
		}
		return true, nil
	}
	m.setPhase(PhaseHandoffUnknown)
	return m.askUntilKnown(base, why)
}
