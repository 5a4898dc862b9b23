package migrate

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate/report"
)

// ErrServing is the error of a migration that was given up while the guest, which runs at
// the destination, lacks memory that is here: it is lost, unless this process goes on.
var ErrServing = errors.New("the guest runs at the destination, and lacks memory that is here")

func popcount(w uint64) int { return bits.OnesCount64(w) }

// wantsPostcopy reports whether the guest is to move now, before all of its memory has.
// began is how many pages of memory were to be sent when round n began, from 1.
func (p *precopy) wantsPostcopy(n int, began uint64) (bool, error) {
	when := p.m.opt.Postcopy
	if when == 0 || p.m.src.Paused() || !p.clock.now().After(p.notBefore) {
		return false, nil
	}
	if resets, err := p.resetting(); resets || err != nil {
		return false, err
	}
	return n >= when && when > 0 || when < 0 && n > 1 && p.tracker.Remaining() >= began/4*3, nil
}

// finishDisks sends what is left of the disks until that fits into the stop: a guest takes
// all of its disks along. It is false if passes no longer shrink; rounds go on then.
func (p *precopy) finishDisks(ctx context.Context) (ready bool, err error) {
	for left := p.disks.remaining(); ; {
		if p.disksFit(left) {
			return true, nil
		}
		if err := p.disks.pass(ctx, p.sender.limit); err != nil {
			return false, err
		}
		was := left
		if left = p.disks.remaining(); left > was/2 {
			return p.disksFit(left), nil
		}
	}
}

// disksFit reports whether the link takes no longer than the limit for what is left of the
// disks. What a stop costs besides does not keep a guest from moving early.
func (p *precopy) disksFit(left uint64) bool {
	return p.model.transfer(left*mempage.Size) <= p.m.opt.DowntimeLimit
}

// moveEarly moves the guest; again is true if it runs on here.
func (p *precopy) moveEarly(ctx context.Context) (again bool, err error) {
	if p.disks != nil {
		if ready, err := p.finishDisks(ctx); err != nil || !ready {
			return true, err
		}
	}
	if p.serving == nil {
		s := &serving{m: p.m, p: p, slots: p.m.src.Slots(), channels: len(p.link.data), limit: p.sender.limit}
		if s.channels == 0 {
			s.channels = 1
		}
		set, err := s.openSet(p.m.ctxOfServing(), p.m.peer)
		if err != nil {
			return false, fmt.Errorf("connect for memory that comes later: %w", err)
		}
		p.serving = s
		// Until COMMIT the loss of a connection ends the migration, as that of others does.
		p.keepSet = context.AfterFunc(set.ctx, func() { p.link.cancel(fmt.Errorf("destination lost: %w", context.Cause(set.ctx))) })
	}
	set := p.serving.set
	// The destination forgets most of what will be missing while the guest runs. No page is
	// under way: the round has been confirmed.
	if err := sendMissing(set.control, p.tracker.unsent(), header{flags: flagPreliminary}); err != nil {
		return false, err
	}
	select {
	case <-set.dropped:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	ready, err := p.flush.ready(p.m.opt.DowntimeLimit/flushShare, p.began)
	if err == nil && !ready {
		p.flush.start(ctx)
		select {
		case <-p.flush.done():
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
		_, err = p.flush.ready(p.m.opt.DowntimeLimit, p.clock.now())
	}
	if err != nil {
		return false, fmt.Errorf("flush the disks: %w", err)
	}
	p.late = true
	again, err = p.switchover(ctx)
	p.late = p.late && !again
	return again, err
}

// unsent returns a copy of what is to be sent.
func (t *tracker) unsent() [][]uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([][]uint64, len(t.slots))
	for i := range t.slots {
		out[i] = slices.Clone(t.slots[i].toSend.Bitmap)
	}
	return out
}

// sendLate is send for a guest that moves before all of its memory has: it announces what
// is missing.
func (p *precopy) sendLate(ctx context.Context, g *stopGuard, s *stop) error {
	m := p.m
	g.at("fetching the dirty log")
	if err := p.sync(); err != nil {
		return err
	}
	if left := p.disks.remaining(); !p.wasPaused && !p.resets && p.model.failed < maxTries && !p.disksFit(left) {
		return &tooMuchError{left}
	}
	m.meter.beginRound(s.round, p.tracker.Remaining())
	g.at("sending the last blocks of the disks and the state")
	if err := s.unlessHalted(func() error {
		if err := p.release(); err != nil {
			return err
		}
		p.hints.done()
		p.samples = m.sampleStorage(g.ctx)
		p.save(ctx, s, true)
		return nil
	}); err != nil {
		return err
	}
	err := p.disks.send(ctx, nil)
	p.watch.lap(&p.watch.parts.Pages)
	<-s.sent
	p.watch.lap(&p.watch.parts.State)
	p.watch.move(&p.watch.parts.State, &p.watch.parts.Storage, s.sampled)
	if err = errors.Join(err, s.err); err != nil {
		if cause := context.Cause(g.ctx); cause != nil {
			return fmt.Errorf("%w: %w", cause, err)
		}
		return err
	}
	if s.isHalted() {
		return errHalted
	}
	g.at("fetching the dirty log")
	if err := p.sync(); err != nil { // R5: saving the state may write memory
		return err
	}
	g.at("announcing the pages that come later")
	if err := p.serving.announce(p.tracker.unsent(), s); err != nil {
		return err
	}
	p.watch.lap(&p.watch.parts.Pages)
	return p.finish(ctx, g, s, true)
}

// announce says what is missing from this stop on, and lets it be sent.
func (s *serving) announce(left [][]uint64, st *stop) error {
	for slot, words := range left { // R6: some may be sent before COMMIT
		s.p.sender.sent[slot].Or(words)
	}
	o := s.set
	o.answering.Lock()
	defer o.answering.Unlock()
	if err := sendMissing(o.control, left, header{first: st.number}); err != nil {
		return err
	}
	return st.unlessHalted(func() error {
		s.servingMu.Lock()
		defer s.servingMu.Unlock()
		s.left, s.pages, s.armed = left, countBits(left), true
		return nil
	})
}

// disarm ends that, before the guest goes on here.
func (s *serving) disarm() {
	if s == nil {
		return
	}
	s.servingMu.Lock()
	defer s.servingMu.Unlock()
	s.armed = false
}

// commit says that COMMIT leaves: from now on each page is sent once.
func (s *serving) commit() {
	s.servingMu.Lock()
	defer s.servingMu.Unlock()
	s.committed = true
}

// close ends the set, if there is one.
func (s *serving) close() {
	if s == nil {
		return
	}
	s.servingMu.Lock()
	set := s.set
	s.set = nil
	s.servingMu.Unlock()
	if set != nil {
		set.close()
	}
}

// Pauses between two attempts to reach the destination again.
const (
	againFirst = 50 * time.Millisecond
	againMost  = 2 * time.Second
)

// serve sends what the destination lacks, and reaches it again when a connection is lost,
// until it lacks nothing.
func (m *Migration) serve(ctx context.Context, s *serving) error {
	m.setPhase(PhasePostcopy)
	m.handoffMu.Lock()
	m.serves = true
	m.handoffMu.Unlock()
	s.servingMu.Lock()
	set := s.set
	pages := s.pages
	s.servingMu.Unlock()
	began := time.Now()
	reported := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(reported)
		t := time.NewTicker(stallsEvery)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				s.report(pages, time.Since(began))
			case <-stop:
				s.report(pages, time.Since(began))
				return
			}
		}
	}()
	defer func() { close(stop); <-reported }()
	wait := againFirst
	for {
		if set != nil {
			since := time.Now()
			err := m.during(ctx, set)
			if err == nil {
				return nil
			}
			s.close()
			set = nil
			if time.Since(since) > time.Second {
				wait = againFirst
			}
			m.lost(s, err)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-m.recover: // at once
		case <-m.release:
			t.Stop()
			return fmt.Errorf("%w: it was given up here", ErrServing)
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%w: %w", ErrServing, context.Cause(ctx))
		}
		t.Stop()
		wait = min(2*wait, againMost)
		next, err := m.again(ctx, s)
		if err != nil {
			m.lost(s, err)
			continue
		}
		set = next
		m.meter.update(func(mt *meter) {
			mt.progress.Error = ""
			mt.postcopy().Recoveries++
		})
	}
}

// during runs a set until the destination lacks nothing, the set is lost, or it is given up.
func (m *Migration) during(ctx context.Context, set *outSet) error {
	defer context.AfterFunc(ctx, func() { set.cancel(context.Cause(ctx)) })()
	over := make(chan struct{})
	defer close(over)
	go func() {
		select {
		case <-m.release:
			set.cancel(ErrServing)
		case <-over:
		}
	}()
	return set.run()
}

// lost records why the destination cannot be reached.
func (m *Migration) lost(s *serving, err error) {
	m.meter.update(func(mt *meter) {
		mt.progress.Error = fmt.Sprintf("connection lost: %v; the guest stands still where it needs a page that is here; trying again", err)
	})
}

// again makes another set of connections, and takes what the destination lacks.
func (m *Migration) again(ctx context.Context, s *serving) (*outSet, error) {
	m.handoffMu.Lock()
	d := m.peer
	m.handoffMu.Unlock()
	set, err := s.openSet(m.ctxOfServing(), d)
	if err != nil {
		return nil, err
	}
	select {
	case bits := <-set.lists:
		s.servingMu.Lock()
		s.left, s.pages, s.slot, s.page = bits, countBits(bits), 0, 0
		s.armed, s.committed = true, true
		s.servingMu.Unlock()
		return set, nil
	case <-set.ctx.Done():
		err := context.Cause(set.ctx)
		s.close()
		if errors.Is(err, errWhole) {
			return set, nil
		}
		return nil, err
	case <-ctx.Done():
		s.close()
		return nil, context.Cause(ctx)
	}
}

// Recover makes a migration whose connections are lost while memory is missing at the
// destination reach it again at once; at another address of the same destination, if
// address is not "".
func (m *Migration) Recover(address string) error {
	m.handoffMu.Lock()
	defer m.handoffMu.Unlock()
	if !m.serves {
		return errors.New("no memory of this guest is missing at a destination: there is nothing to recover")
	}
	if address != "" {
		m.peer = newDialer(address, m.opt)
		m.meter.update(func(mt *meter) { mt.progress.Address = address })
	}
	select {
	case m.recover <- struct{}{}:
	default:
	}
	return nil
}

// Serving reports whether the guest runs at the destination, and lacks memory that is here.
func (m *Migration) Serving() bool {
	m.handoffMu.Lock()
	defer m.handoffMu.Unlock()
	return m.serves && !isClosed(m.done)
}

// ctxOfServing is what the connections of a set live in: the loss of a session's control
// connection does not end them.
func (m *Migration) ctxOfServing() context.Context { return m.serveCtx }

// report puts what is known into progress and result.
func (s *serving) report(pages uint64, took time.Duration) {
	s.servingMu.Lock()
	st, left, bulk, wanted := s.stalls, s.pages, s.moved, s.wanted
	set := s.set
	s.servingMu.Unlock()
	var sent uint64
	if set != nil {
		sent = set.control.flow.sent.Load()
		for _, c := range set.lanes {
			sent += c.flow.sent.Load()
		}
	}
	s.p.m.meter.update(func(mt *meter) {
		r := mt.postcopy()
		if sent >= r.setBytes {
			r.bytes += sent - r.setBytes
		} else {
			r.bytes += sent
		}
		r.setBytes = sent
		if !s.isWhole() {
			left = max(left, st.Left)
		} else {
			left = 0
		}
		mt.progress.RemainingBytes = left * mempage.Size
		r.Postcopy = report.Postcopy{Pages: pages, PagesWanted: wanted, PagesRest: bulk, Duration: took, Faults: st.Faults, Local: st.Local,
			P50: st.P50, P99: st.P99, Longest: st.Longest, Stalled: st.Total, Recoveries: r.Recoveries, VCPUs: report.Milliseconds(st.PerVCPU)}
		shown := r.Postcopy
		mt.result.Postcopy, mt.progress.Postcopy = &shown, &shown
	})
}

func (s *serving) isWhole() bool {
	s.servingMu.Lock()
	defer s.servingMu.Unlock()
	return s.whole
}

// meterPostcopy is the meter's record.
type meterPostcopy struct {
	report.Postcopy
	bytes, setBytes uint64
}

// postcopy returns the record. It needs mu.
func (m *meter) postcopy() *meterPostcopy {
	if m.later == nil {
		m.later = &meterPostcopy{}
	}
	return m.later
}
