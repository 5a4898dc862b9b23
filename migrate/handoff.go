package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// handOver hands over the right to run and finds out who has it. The guest is
// stopped here; it goes on only if the destination says that it aborted.
func (m *Migration) handOver(base context.Context, p *precopy) error {
	if p.late {
		p.keepSet()
		p.serving.commit()
	}
	running, why := m.decide(base, p.link, p.stops, p.watch)
	if errors.Is(why, ErrHandoffUnknown) {
		p.serving.close()
		p.hints.finish(false)
		return why
	}
	if !running {
		err := fmt.Errorf("the destination gave the right to run back, the guest goes on here: %w", why)
		return errors.Join(err, m.takeBack(base, p))
	}
	took, parts := p.watch.finish()
	m.meter.update(func(mt *meter) {
		mt.result.Downtime, mt.result.DowntimeParts = took, parts
		if !p.wasPaused {
			mt.result.DowntimeNote = p.expected.note(took, parts)
		}
		mt.result.Total = time.Since(mt.started)
	})
	// The log of a guest that has gone may stay on: to turn it off takes milliseconds,
	// and its memory is freed next.
	p.hints.finish(false)
	if p.late {
		if err := m.serve(base, p.serving); err != nil {
			return err
		}
		m.meter.update(func(mt *meter) { mt.result.Total = time.Since(mt.started) })
		return nil
	}
	p.serving.close() // it was not needed after all
	return nil
}

// errAborted is the destination's verdict that it does not run the guest.
var errAborted = errors.New("it aborted")

// sendCommit sends COMMIT and waits for RUNNING. After a failedError the destination
// will not run the guest; after any other error nothing is known.
func (m *Migration) sendCommit(l *link, stop uint64, watch *stopwatch) (running bool, why error) {
	if err := l.conn.writeFrame(header{typ: frameCommit, first: stop}); err != nil {
		// It may have left nevertheless.
		return false, l.explain(err)
	}
	r, err := l.awaitWithin(l.ctx, frameRunning, startPatience*m.opt.PeerTimeout)
	if err != nil {
		return false, err
	}
	// It runs there, also if the payload is wrong.
	watch.parts.Resume, _, _ = decodeTook(r)
	return true, nil
}

// startPatience times PeerTimeout is how long a destination that lives may take to start
// the guest before the source says that it does not know who has it, and to free the last
// session's machine before it says HELLO_OK.
const startPatience = 6

// Pauses between two queries.
const (
	askFirst = 50 * time.Millisecond
	askMost  = 2 * time.Second
)

// askUntilKnown reconnects and asks for the verdict until it is known. If the guest
// does not run there the error is errAborted, or ErrHandoffUnknown if ctx or Abandon
// ended the queries.
func (m *Migration) askUntilKnown(ctx context.Context, unheard error) (running bool, why error) {
	pause := time.NewTimer(0)
	defer pause.Stop()
	for wait := askFirst; ; wait = min(2*wait, askMost) {
		select {
		case <-pause.C:
		case <-m.release:
			return false, fmt.Errorf("%w: %v; the guest was taken back by force", ErrHandoffUnknown, unheard)
		case <-ctx.Done():
			return false, fmt.Errorf("%w: %v; stopped asking: %v", ErrHandoffUnknown, unheard, context.Cause(ctx))
		}
		verdict, err := m.ask(ctx)
		switch {
		case err != nil:
			unheard = err
		case verdict == verdictRunning:
			return true, nil
		case verdict == verdictAborted:
			return false, errAborted
		case verdict == verdictPending:
			unheard = fmt.Errorf("%s is starting the guest", m.peer.address)
		default:
			unheard = fmt.Errorf("%s does not know this migration", m.peer.address)
		}
		m.meter.update(func(mt *meter) {
			mt.progress.Error = fmt.Sprintf("%v: %v", ErrHandoffUnknown, unheard)
		})
		pause.Reset(wait)
	}
}

// ask makes one query.
func (m *Migration) ask(ctx context.Context) (string, error) {
	c, err := m.peer.connect(ctx, newHello(purposeQuery, m.session))
	if err != nil {
		return "", err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	_ = c.SetDeadline(time.Now().Add(m.opt.PeerTimeout)) // where it has no effect, ctx ends it
	r, err := c.readHeader()
	if err != nil {
		return "", fmt.Errorf("ask %s for its verdict: %w", m.peer.address, err)
	}
	if r.typ == frameRefused {
		var no refused
		if err := c.readControl(r, &no); err != nil {
			return "", err
		}
		return "", fmt.Errorf("ask %s for its verdict: %w", m.peer.address, refusal(no.Reasons))
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
