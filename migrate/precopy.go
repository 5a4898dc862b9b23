package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/govmm/govmm/mempage"
)

// precopy is the part of a migration between READY and COMMIT: rounds while
// the guest runs, then the stop.
type precopy struct {
	m       *Migration
	link    *link
	tracker *tracker
	sender  *sender
	hints   *hinter

	model     *downtimeModel
	brake     brake
	stopped   bool         // PauseForHandoff has been called and not undone
	wasPaused bool         // the user had paused the guest before
	watch     *stopwatch   // of the stop under way
	expected  expectedStop // when that stop was decided on
}

func newPrecopy(m *Migration, l *link, t *tracker) (*precopy, error) {
	s, err := newSender(m.src, t, l, &m.meter, m.opt)
	return &precopy{m: m, link: l, tracker: t, model: newDowntimeModel(l.rtt), sender: s}, err
}

// converge sends rounds until what remains fits the downtime limit, then stops
// the guest and sends the rest. When it returns nil the destination is
// PREPARED.
func (p *precopy) converge(ctx context.Context) error {
	for n := 0; ; n++ {
		began := p.tracker.Remaining()
		if err := p.round(ctx, n); err != nil {
			return err
		}
		if p.model.mayTry(p.tracker.Remaining(), p.m.opt.DowntimeLimit) {
			again, err := p.switchover(ctx, n+1)
			if err != nil || !again {
				return err
			}
		}
		if limit := p.m.opt.MaxRounds; limit > 0 && n+1 >= limit {
			return fmt.Errorf("%w: after %d rounds the estimated downtime is %v, the limit %v; the guest goes on here",
				ErrNotConverged, n+1, p.estimate().Round(time.Millisecond), p.m.opt.DowntimeLimit)
		}
		if n > 0 { // of round 0 every page was to be sent
			if err := p.slowDown(began); err != nil {
				return err
			}
		}
	}
}

// slowDown raises the throttle if rounds do not shrink and the options allow it.
func (p *precopy) slowDown(began uint64) error {
	if !p.m.opt.AutoConverge || p.estimate() <= p.m.opt.DowntimeLimit {
		return nil
	}
	if !p.brake.round(began, p.tracker.Remaining(), time.Now()) {
		return nil
	}
	return p.throttle(p.brake.percent)
}

// throttle slows the guest down; 0 ends that.
func (p *precopy) throttle(percent int) error {
	t, ok := p.m.src.(Throttler)
	if !ok {
		return nil
	}
	if err := t.Throttle(percent); err != nil {
		return fmt.Errorf("throttle the guest to %d%%: %w", percent, err)
	}
	p.m.meter.update(func(m *meter) {
		m.progress.ThrottlePercent = percent
		m.result.ThrottlePercent = max(m.result.ThrottlePercent, percent)
	})
	return nil
}

// release ends the throttle.
func (p *precopy) release() error {
	if p.brake.percent == 0 {
		return nil
	}
	return p.throttle(0)
}

// round sends what is to be sent, then fetches the dirty log.
func (p *precopy) round(ctx context.Context, n int) error {
	if err := p.hints.before(ctx, n, p.model.throughput()); err != nil {
		return err
	}
	began, dirtied := time.Now(), p.tracker.Dirtied()
	p.m.meter.beginRound(n, p.tracker.Remaining())
	// The log of a slot is fetched again just before the slot is sent: a page that
	// was written since the round began then goes in this round and not in the next
	// one, so rounds are fewer (docs/hints.md).
	if err := p.sender.send(ctx, p.sender.limit, func(slot int) error {
		before := p.tracker.SlotRemaining(slot)
		if _, err := p.tracker.SyncSlot(slot); err != nil {
			return err
		}
		// Hints may have removed more than the fetch has added.
		p.m.meter.dirtied(max(p.tracker.SlotRemaining(slot), before) - before)
		return p.hints.look()
	}); err != nil {
		return err
	}
	if err := p.barrier(ctx, n); err != nil {
		return err
	}
	stats, d := p.m.meter.endRound()
	p.model.round(stats.PagesSent*mempage.Size, d)
	if err := p.tracker.Sync(); err != nil {
		return err
	}
	written := (p.tracker.Dirtied() - dirtied) * mempage.Size
	rate := float64(written) / max(time.Since(began).Seconds(), 1e-6)
	p.m.meter.update(func(m *meter) {
		m.progress.BandwidthBytes = uint64(p.model.throughput())
		m.progress.DirtyRateBytes = uint64(rate)
		m.progress.RemainingBytes = p.tracker.Remaining() * mempage.Size
		m.progress.EstimatedDowntime = p.estimate()
	})
	return nil
}

// barrier ends a round on the wire and waits until all of it has landed. So the
// time of the round gives the bandwidth from memory to memory, and nothing is left
// in socket buffers that would lengthen the downtime.
func (p *precopy) barrier(ctx context.Context, n int) error {
	if err := p.sender.flush(n, 0); err != nil {
		return err
	}
	asked := time.Now()
	r, err := p.awaitLanded(ctx, frameRound)
	if err != nil {
		return err
	}
	p.model.echoed(time.Since(asked))
	if r.first != uint64(n) {
		return fmt.Errorf("%w: the destination confirmed round %d instead of %d", ErrProtocol, r.first, n)
	}
	return nil
}

// awaitLanded waits for a reply to what may still be in socket buffers. While they
// drain, the destination is slow and not dead.
func (p *precopy) awaitLanded(ctx context.Context, want frameType) (reply, error) {
	queued, _ := p.link.queued()
	for {
		r, err := p.link.await(ctx, want, p.m.opt.PeerTimeout)
		if !errors.Is(err, errNoReply) {
			return r, err
		}
		left, ok := p.link.queued()
		if !ok || left >= queued {
			return reply{}, err
		}
		queued = left
	}
}

// estimate is the downtime if the guest stopped now.
func (p *precopy) estimate() time.Duration { return p.model.downtime(p.tracker.Remaining()) }
