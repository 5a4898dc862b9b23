package migrate

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/govmm/govmm/mempage"
)

// precopy is the part of a migration between READY and COMMIT: rounds while
// the guest runs, then the stop.
type precopy struct {
	m       *Migration
	link    *link
	tracker *tracker
	disks   *diskCopy // nil: none are copied
	sender  *sender
	hints   *hinter

	model     *downtimeModel
	brake     brake
	clock     clock
	pace      pace
	flush     flushing
	rounds    int       // numbers rounds, those of stops too
	began     time.Time // when the last round began
	stops     uint64    // numbers stops in which something was sent
	tooLong   int       // stops that were undone since they took too long
	notBefore time.Time // of the next stop
	dropOnce  sync.Once
	dropped   chan struct{} // closed by drop
	stopped   bool          // PauseForHandoff has been called and not undone
	wasPaused bool          // the user had paused the guest before
	resets    bool          // the guest waits for its reset
	watch     *stopwatch    // of the stop under way
	samples   *samples      // of the storage; nil: the destination does not compare it
	expected  expectedStop  // when that stop was decided on

	late    bool        // the guest moves before all of its memory has
	serving *serving    // what comes later; nil: nothing has been announced
	keepSet func() bool // ends the watch on the connections of serving
}

func newPrecopy(m *Migration, l *link, t *tracker) (*precopy, error) {
	s, err := newSender(m.src, t, l, &m.meter, m.opt)
	dropped := make(chan struct{})
	if err == nil && s.limit != nil {
		s.limit.over = dropped
	}
	return &precopy{m: m, link: l, tracker: t, model: newDowntimeModel(l.rtt), sender: s, clock: m.clock,
		flush: flushing{src: m.src, clock: m.clock}, dropped: dropped}, err
}

// converge sends rounds until what remains fits the downtime limit, then stops
// the guest and sends the rest. When it returns nil the destination is
// PREPARED, and COMMIT may be sent.
func (p *precopy) converge(ctx context.Context) error {
	for n := 1; ; n++ {
		began, memory := p.remaining(), p.tracker.Remaining()
		if err := p.round(ctx, p.nextRound()); err != nil {
			return err
		}
		last := p.m.opt.MaxRounds > 0 && n >= p.m.opt.MaxRounds
		again, err := p.tryStop(ctx, last)
		if err != nil || !again {
			return err
		}
		if early, err := p.wantsPostcopy(n, memory); err != nil {
			return err
		} else if early {
			if again, err := p.moveEarly(ctx); err != nil || !again {
				return err
			}
		}
		if last {
			return fmt.Errorf("%w: after %d rounds the estimated downtime is %v, the limit %v%s; the guest goes on here",
				ErrNotConverged, n, p.estimate().Round(time.Millisecond), p.m.opt.DowntimeLimit, p.disks.left())
		}
		if n > 1 { // of the first round every page was to be sent
			if err := p.slowDown(began); err != nil {
				return err
			}
		}
		if err := p.rest(ctx); err != nil {
			return err
		}
	}
}

// nextRound returns the number of a round.
func (p *precopy) nextRound() int {
	p.rounds++
	return p.rounds - 1
}

// tryStop stops the guest if that is possible within the limit; again is true if the
// guest runs on. Before the stop the disks are flushed: rounds go on while that takes
// long, unless this was the last one. Before the flush a stop is tried, if only the
// assumptions about its cost stand against it.
func (p *precopy) tryStop(ctx context.Context, last bool) (again bool, err error) {
	limit := p.m.opt.DowntimeLimit
	for {
		left := p.remaining()
		resets, err := p.resetting()
		if err != nil {
			return false, err
		}
		if !resets && p.clock.now().Before(p.notBefore) {
			return true, nil
		}
		if resets || p.m.src.Paused() { // it has no downtime
			return p.switchover(ctx)
		}
		if p.model.wantsTrial(left, limit) {
			if err := p.trial(ctx); err != nil {
				return false, err
			}
			if resets, _ := p.resetting(); resets { // it did when it was stopped
				continue
			}
		}
		if !p.model.mayTry(left, limit) {
			return true, nil
		}
		ready, err := p.flush.ready(limit/flushShare, p.began)
		if err != nil {
			return false, fmt.Errorf("flush the disks: %w", err)
		}
		if ready {
			p.model.flush = p.flush.took
			if p.model.mayTry(left, limit) {
				return p.switchover(ctx)
			}
			return true, nil
		}
		p.flush.start(ctx)
		var enough <-chan time.Time
		if !last {
			enough = p.clock.after(shortPause)
		}
		p.began = p.clock.now() // what follows is as good as a round
		select {
		case <-p.flush.done():
		case <-enough:
			return true, nil
		case <-p.dropped:
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
		if err := p.syncAll(); err != nil {
			return false, err
		}
	}
}

// flushShare is how many times the flush in a stop should fit the limit: one that takes
// longer is made once more before the stop, if that makes it shorter.
const flushShare = 8

// rest waits before a round that would hardly send anything, or that cannot lead to a
// stop, since the disks are being flushed; their end ends it.
func (p *precopy) rest(ctx context.Context) error {
	idle := p.flush.running != nil || p.remaining()*mempage.Size < significantBytes
	pause := p.pace.next(idle)
	if pause == 0 {
		return nil
	}
	select {
	case <-p.clock.after(pause):
	case <-p.flush.done():
	case <-p.dropped:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return nil
}

// slowDown raises the throttle if rounds do not shrink and the options allow it.
func (p *precopy) slowDown(began uint64) error {
	if !p.m.opt.AutoConverge || p.estimate() <= p.m.opt.DowntimeLimit {
		return nil
	}
	if !p.brake.round(began, p.remaining(), time.Now()) {
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
	p.began = p.clock.now()
	p.m.meter.beginRound(n, p.tracker.Remaining())
	blocks := p.disks.moved()
	if err := p.disks.send(ctx, p.sender.limit); err != nil {
		return err
	}
	// The log of a slot is fetched again just before the slot is sent: a page that
	// was written since the round began then goes in this round and not in the next
	// one, so rounds are fewer (docs/hints.md).
	if n == 0 {
		p.sender.admit = p.hints.admit
		defer func() { p.sender.admit = nil }()
	}
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
	if n == 0 && p.hints.mode == HintsAuto {
		d -= p.hints.waited // nothing moved
	}
	p.model.round(stats.PagesSent*mempage.Size+p.disks.moved()-blocks, d)
	if err := p.syncAll(); err != nil {
		return err
	}
	p.hints.after(n)
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

// carried is what the data connections have carried: pages with content that are sent, how
// many of these the destination's kernel has, and the time in which some were written.
func (p *precopy) carried() (sent uint64, landed float64, busy time.Duration) {
	sent, written, busy := p.sender.moved.progress()
	landed = float64(written)
	if queued, ok := p.link.queued(); ok {
		landed *= 1 - min(1, float64(queued)/max(1, float64(p.link.sent())))
	}
	return sent, landed, busy
}

// barrier ends a round on the wire and waits until all of it has landed. So the
// time of the round gives the bandwidth from memory to memory, and nothing is left
// in socket buffers that would lengthen the downtime.
func (p *precopy) barrier(ctx context.Context, n int) error {
	flags := uint8(0)
	if p.disks != nil {
		flags = flagDurable
	}
	if err := p.sender.flush(n, flags); err != nil {
		return err
	}
	asked := time.Now()
	r, err := p.link.await(ctx, frameRound)
	if err != nil {
		return err
	}
	p.model.echoed(time.Since(asked))
	if r.first != uint64(n) {
		return fmt.Errorf("%w: the destination confirmed round %d instead of %d", ErrProtocol, r.first, n)
	}
	return nil
}

// remaining is what is left of memory and disks, in pages.
func (p *precopy) remaining() uint64 { return p.tracker.Remaining() + p.disks.remaining() }

// syncAll fetches what the guest has written to memory and disks.
func (p *precopy) syncAll() error {
	if err := p.disks.sync(); err != nil {
		return err
	}
	return p.tracker.Sync()
}

// estimate is the downtime if the guest stopped now.
func (p *precopy) estimate() time.Duration { return p.model.downtime(p.remaining()) }
