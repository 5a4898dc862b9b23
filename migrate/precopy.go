package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// precopy is the part of a migration between READY and COMMIT: rounds while
// the guest runs, then the stop.
type precopy struct {
	m       *Migration
	link    *link
	tracker *Tracker
	sender  *sender

	bandwidth float64 // bytes a second, of the last round that says something
	stopped   bool    // PauseForHandoff has been called and not undone
	wasPaused bool    // the user had paused the guest before
	retries   int     // switchovers given up because the estimate broke
}

const (
	// stateTime is what saving, sending and loading the machine's state is
	// estimated to take, besides the round trips.
	stateTime = 20 * time.Millisecond
	// maxRetries bounds how often a stop that turned out too long is undone.
	maxRetries = 3
	// significant is how many bytes make a round's bandwidth worth believing.
	significant = 1 << 20
)

// converge sends rounds until what remains fits the downtime limit, then stops
// the guest and sends the rest. When it returns nil the destination is
// PREPARED; since is when the last vCPU stopped.
func (p *precopy) converge(ctx context.Context) (since time.Time, err error) {
	for n := 0; ; n++ {
		if err := p.round(ctx, n); err != nil {
			return time.Time{}, err
		}
		if p.estimate() <= p.m.opt.DowntimeLimit {
			since, again, err := p.switchover(ctx, n+1)
			if err != nil || !again {
				return since, err
			}
		}
		if limit := p.m.opt.MaxRounds; limit > 0 && n+1 >= limit {
			return time.Time{}, fmt.Errorf("%w: after %d rounds the estimated downtime is %v, the limit %v; the guest goes on here",
				ErrNotConverged, n+1, p.estimate().Round(time.Millisecond), p.m.opt.DowntimeLimit)
		}
	}
}

// round sends once what is to be sent, then syncs.
func (p *precopy) round(ctx context.Context, n int) error {
	began, dirtied := time.Now(), p.tracker.Dirtied()
	p.m.meter.beginRound(n, p.tracker.Remaining())
	for slot := range p.sender.slots {
		// Fetched just before it is sent, a page that was written since the
		// round began goes once, not now and again in the next round.
		before := p.tracker.Remaining()
		if _, err := p.tracker.SyncSlot(slot); err != nil {
			return err
		}
		p.m.meter.dirtied(p.tracker.Remaining() - before)
		if err := p.sender.sendSlot(ctx, slot, p.sender.limit); err != nil {
			return err
		}
	}
	if err := p.barrier(ctx, n); err != nil {
		return err
	}
	bytes, d := p.m.meter.endRound()
	if bytes >= significant || p.bandwidth == 0 {
		p.bandwidth = float64(bytes) / max(d.Seconds(), 1e-6)
	}
	if err := p.tracker.Sync(); err != nil {
		return err
	}
	written := (p.tracker.Dirtied() - dirtied) * PageSize
	rate := float64(written) / max(time.Since(began).Seconds(), 1e-6)
	p.m.meter.update(func(m *meter) {
		m.progress.BandwidthBytes = uint64(p.bandwidth)
		m.progress.DirtyRateBytes = uint64(rate)
		m.progress.RemainingBytes = p.tracker.Remaining() * PageSize
		m.progress.EstimatedDowntimeMS = float64(p.estimate().Microseconds()) / 1000
	})
	return nil
}

// barrier ends a round on the wire and waits until all of it has landed: what
// the round took is then the bandwidth from memory to memory, and nothing of
// it is left in socket buffers to lengthen the downtime.
func (p *precopy) barrier(ctx context.Context, n int) error {
	if err := p.link.conn.writeFrame(header{typ: frameRound, first: uint64(n)}); err != nil {
		return err
	}
	r, err := p.awaitLanded(ctx, frameRound)
	if err != nil {
		return err
	}
	if r.first != uint64(n) {
		return fmt.Errorf("%w: the destination confirmed round %d instead of %d", ErrProtocol, r.first, n)
	}
	return nil
}

// awaitLanded waits for a reply to what may still be in socket buffers: while
// those empty, a slow destination is only slow.
func (p *precopy) awaitLanded(ctx context.Context, want frameType) (reply, error) {
	queued, _ := p.link.conn.queued()
	for {
		r, err := p.link.await(ctx, want, p.m.opt.PeerTimeout)
		if !errors.Is(err, errNoReply) {
			return r, err
		}
		left, ok := p.link.conn.queued()
		if !ok || left >= queued {
			return reply{}, err
		}
		queued = left
	}
}

// estimate is the downtime if the guest stopped now.
func (p *precopy) estimate() time.Duration {
	d := stateTime + 2*p.link.rtt // STATE to PREPARED, COMMIT to RUNNING
	if left := p.tracker.Remaining() * PageSize; left > 0 {
		d += time.Duration(float64(left) / max(p.bandwidth, 1) * float64(time.Second))
	}
	return d
}

// switchover stops the guest and sends all that is left, and the state. again
// is true when the guest runs on because more was left than the estimate said.
func (p *precopy) switchover(ctx context.Context, n int) (since time.Time, again bool, err error) {
	m := p.m
	m.setPhase(PhaseSwitchover)
	p.stopped = true // even if it fails half way
	wasRunning, err := m.src.PauseForHandoff(ctx)
	since = time.Now()
	if err != nil {
		return since, false, fmt.Errorf("stop the guest: %w", err)
	}
	p.wasPaused = !wasRunning

	// The state before the last sync: should saving it write to RAM, the sync
	// still sees it.
	state, err := m.src.SaveState()
	if err != nil {
		return since, false, fmt.Errorf("save the machine's state: %w", err)
	}
	if len(state) > maxState {
		return since, false, fmt.Errorf("the machine's state has %d bytes, at most %d can be sent", len(state), maxState)
	}
	if err := p.tracker.Sync(); err != nil { // R5: the last sync
		return since, false, err
	}
	if wasRunning && p.retries < maxRetries && p.estimate() > m.opt.DowntimeLimit {
		p.retries++
		p.stopped = false
		if err := m.src.ResumeAfterAbort(); err != nil {
			return since, false, fmt.Errorf("resume at the source: %w", err)
		}
		m.setPhase(PhasePrecopy)
		return since, true, nil
	}

	m.meter.beginRound(n, p.tracker.Remaining())
	for slot := range p.sender.slots {
		if err := p.sender.sendSlot(ctx, slot, nil); err != nil {
			return since, false, err
		}
	}
	if m.opt.VerifyPages {
		if err := p.sender.sendHashes(ctx); err != nil {
			return since, false, err
		}
	}
	h := header{typ: frameState}
	if p.wasPaused {
		h.flags |= flagPaused
	}
	if err := p.link.conn.writeFrame(h, state); err != nil {
		return since, false, err
	}
	m.meter.endRound()
	timeout := m.opt.PeerTimeout
	if m.opt.VerifyPages {
		timeout += time.Duration(m.Result().RAMBytes / hashRate * uint64(time.Second))
	}
	_, err = p.link.await(ctx, framePrepared, timeout)
	return since, false, err
}

// hashRate is how many bytes a second any machine can hash.
const hashRate = 50 << 20
