package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// settle hands over the right to run and finds out who has it. The guest
// stands still here; only the destination's word that it aborted lets it go on.
func (m *Migration) settle(base context.Context, p *precopy) error {
	l := p.link
	running, why := m.sendCommit(l, p.watch)
	l.close()
	if failed := (*failedError)(nil); !running && !errors.As(why, &failed) {
		m.setPhase(PhaseHandoffUnknown)
		running, why = m.askUntilKnown(base, why)
		if errors.Is(why, ErrHandoffUnknown) {
			p.hints.finish(false)
			return why
		}
	}
	if !running {
		err := fmt.Errorf("the destination gave the right to run back, the guest goes on here: %w", why)
		return errors.Join(err, m.takeBack(base, p))
	}
	took, parts := p.watch.finish()
	m.meter.update(func(mt *meter) {
		mt.result.Downtime, mt.result.DowntimeParts = took, parts
		if !p.wasPaused {
			mt.result.DowntimeNote = p.plan.note(took, parts)
		}
		mt.result.Total = time.Since(mt.started)
	})
	p.hints.finish(false)
	// The guest has gone; a log that cannot be stopped does not change that.
	_ = p.tracker.Stop()
	return nil
}

// errAborted is the destination's verdict that it does not run the guest.
var errAborted = errors.New("it aborted")

// sendCommit sends COMMIT and waits for RUNNING. Its error is the destination's
// own word that it will not run the guest (failedError), or means that nothing
// is known.
func (m *Migration) sendCommit(l *link, w *stopwatch) (running bool, why error) {
	if err := l.conn.writeFrame(header{typ: frameCommit}); err != nil {
		// Even so it may have left.
		return false, l.explain(err)
	}
	r, err := l.await(l.ctx, frameRunning, m.opt.PeerTimeout)
	if err != nil {
		return false, err
	}
	// It runs there, whatever else it says.
	w.parts.Resume, _ = decodeTook(r)
	return true, nil
}

// Pauses between two attempts to ask.
const (
	askFirst = 50 * time.Millisecond
	askMost  = 2 * time.Second
)

// askUntilKnown reconnects and asks for the verdict until it is known. Not
// running comes with errAborted, or with ErrHandoffUnknown when ctx or Abandon
// ended the asking.
func (m *Migration) askUntilKnown(ctx context.Context, lost error) (running bool, why error) {
	pause := time.NewTimer(0)
	defer pause.Stop()
	for wait := askFirst; ; wait = min(2*wait, askMost) {
		select {
		case <-pause.C:
		case <-m.release:
			return false, fmt.Errorf("%w: %v; the guest was taken back by force", ErrHandoffUnknown, lost)
		case <-ctx.Done():
			return false, fmt.Errorf("%w: %v; stopped asking: %v", ErrHandoffUnknown, lost, context.Cause(ctx))
		}
		verdict, err := m.ask(ctx)
		switch {
		case err != nil:
			lost = err
		case verdict == verdictRunning:
			return true, nil
		case verdict == verdictAborted:
			return false, errAborted
		default:
			lost = fmt.Errorf("%s does not know this migration", m.peer.address)
		}
		m.meter.update(func(mt *meter) {
			mt.progress.Error = fmt.Sprintf("%v: %v", ErrHandoffUnknown, lost)
		})
		pause.Reset(wait)
	}
}

// ask makes one connection and returns the verdict.
func (m *Migration) ask(ctx context.Context) (string, error) {
	c, err := m.peer.connect(ctx, newHello(purposeQuery, m.session))
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.readTimeout = m.opt.PeerTimeout
	r, err := c.readHeader()
	if err != nil {
		return "", fmt.Errorf("ask %s for its verdict: %w", m.peer.address, err)
	}
	if r.typ != frameVerdict {
		return "", fmt.Errorf("%w: %s answered a query with %v", ErrProtocol, m.peer.address, r.typ)
	}
	var v verdictMsg
	if err := c.readControl(r, &v); err != nil {
		return "", err
	}
	return v.Verdict, nil
}
