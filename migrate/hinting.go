package migrate

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/mempage"
)

// HintMode says whether the guest is asked for its free pages, which are not sent.
type HintMode string

// The modes of [Options.Hints].
const (
	HintsAuto HintMode = "auto" // ask a guest that can be asked, while that saves time
	HintsOn   HintMode = "on"   // ask, and report if the guest cannot be asked
	HintsOff  HintMode = "off"
)

// Reasons why the guest is not asked, or not any more.
var (
	errHintsSilent = errors.New("the guest did not answer")
	errHintsMode   = errors.New("turned off")
	errHintsGone   = errors.New("the guest's balloon driver has been reset")
	errHintsZeroed = errors.New("the guest writes zeros over what it hints (init_on_alloc), most of which it had never used")
)

const (
	// stopPatience is how long a driver may take to end its answer after STOP, before
	// it is not asked again.
	stopPatience = time.Second
	// hintTick is how often the hints are inspected while nothing is sent.
	hintTick = 5 * time.Millisecond
	// payingShare: asking again pays if the last answer saved one of so many pages
	// that were to be sent.
	payingShare = 16
)

// hintState is the state of the exchange with the driver.
type hintState uint8

const (
	hintsIdle      hintState = iota // not asked yet
	hintsAsked                      // an id is announced
	hintsAnswering                  // START with that id has come
	hintsEnded                      // STOP has come after it: the answer is complete
)

// hinter asks for hints during one migration and passes them to the tracker. The
// migration's goroutine calls before, after, stop, done and finish; a goroutine of the
// hint source calls the methods of [mempage.HintSink]. During a round the worker whose
// turn it is calls admit and look.
//
// Order of locks: the source's own, hinter.mu, tracker.mu, meter.mu. When the source
// calls the sink it holds no lock that its other methods take; hinter holds no lock
// when it calls the source or the tracker.
type hinter struct {
	source  HintSource // nil: no hints
	ram     RAM
	slots   []Slot
	tracker *tracker
	meter   *meter
	mode    HintMode
	wait    time.Duration

	mu      sync.Mutex // guards the fields down to changed
	state   hintState
	id      uint32
	asked   time.Time
	began   time.Duration // from the announcement to the driver's START; 0: it has not come
	stopped time.Time     // STOP was announced; zero: the id is current
	answer  time.Duration // from the announcement to the driver's STOP
	off     error         // why the guest is not asked, or not any more
	changed chan struct{} // holds one: state or off has changed

	// Of the migration's goroutine, and of the worker whose turn it is.
	toldDone bool   // done was called
	begun    uint64 // pages to be sent when the epoch began
	taken    uint64 // HintStats.Taken then
	earlier  uint64 // passed then
	waited   time.Duration
	inspect  inspection
	pace     hintPace
	carried  func() (sent uint64, landed float64, busy time.Duration)

	// Counts of pages; atomic, since the sink counts while results are read.
	named, passed, dropped atomic.Uint64

	// Of the sink's goroutine.
	pages     []pageRange // of the ranges of one call
	batch     []pageRange
	batched   uint64 // pages
	populated []uint64
}

const (
	// hintBatch and hintBatchPages bound a batch for the tracker: ranges, and pages in
	// all of them (4 GiB).
	hintBatch      = 512
	hintBatchPages = 1 << 20
	// hintSpan is how many pages are checked for holes at once.
	hintSpan = 1 << 16
)

// newHinter makes a hinter, which is off if the guest cannot be asked.
func newHinter(m *Migration, t *tracker) *hinter {
	h := &hinter{ram: m.src, slots: m.src.Slots(), tracker: t, meter: &m.meter, mode: m.opt.Hints, wait: m.opt.HintWait,
		changed: make(chan struct{}, 1),
		pace: hintPace{limit: float64(m.opt.BandwidthLimit) / mempage.Size, most: m.opt.HintWait, lanes: m.opt.Channels,
			short: runtime.GOMAXPROCS(0) < m.opt.Channels+2}}
	if h.mode == HintsOff {
		h.off = errHintsMode
		return h
	}
	if s, ok := m.src.(Hinting); ok {
		h.source = s.HintSource()
	}
	if h.source == nil {
		h.off = ErrNoHintSource
		return h
	}
	h.batch = make([]pageRange, 0, hintBatch)
	h.populated = make([]uint64, hintSpan/mempage.WordBits)
	h.source.SetHintSink(h)
	return h
}

// before is called before round n. It asks for hints if that pays. In mode on it gives
// the guest a head start in the first round; in mode auto, admit does. bandwidth is that
// of the last rounds, in bytes a second.
func (h *hinter) before(ctx context.Context, n int, bandwidth float64) error {
	if h.source == nil {
		return nil
	}
	if n == 0 {
		if err := h.ask(); err != nil || h.mode == HintsAuto {
			return err
		}
		return h.headStart(ctx)
	}
	if err := h.look(); err != nil {
		return err
	}
	if !h.again(bandwidth) {
		return nil
	}
	h.source.StopHints() // the driver's STOP has come already
	return h.ask()
}

// after is called after round n. What is left after the first round is what the guest
// has just written: in mode auto it need not go on naming what was sent.
func (h *hinter) after(n int) {
	if n > 0 || h.mode != HintsAuto || h.source == nil || h.tracker.Remaining()*payingShare > h.begun {
		return
	}
	if state, off := h.where(); !off && state != hintsEnded {
		h.stop()
	}
}

// admit is called in the first round of mode auto before a worker picks pages, in turn. It
// waits while that pays, and returns how many pages may be picked.
func (h *hinter) admit(ctx context.Context) (most uint64, err error) {
	for {
		if err := h.look(); err != nil {
			return 0, err
		}
		h.mu.Lock()
		open := h.off == nil && (h.state == hintsAsked || h.state == hintsAnswering) && h.stopped.IsZero()
		h.mu.Unlock()
		if !open {
			return maxSpan, nil
		}
		h.measure()
		if h.pace.hopeless(h.tracker.Remaining()) {
			h.stop()
			return maxSpan, nil
		}
		if h.tracker.Remaining() == 0 || !h.pace.waits() {
			return h.pace.span(), nil
		}
		if err := h.pause(ctx); err != nil {
			return 0, err
		}
	}
}

// measure brings the pace up to date.
func (h *hinter) measure() {
	h.mu.Lock()
	began, asked := h.began, time.Since(h.asked)
	h.mu.Unlock()
	sent, landed, busy := h.carried()
	h.pace.sent = sent
	h.pace.link.add(busy, landed)
	worth := h.inspect.worth()
	h.pace.note(began, asked, float64(h.passed.Load()-h.earlier)*worth, float64(h.tracker.HintStats().Taken-h.taken)*worth)
}

// pause waits until something has changed, or for a moment.
func (h *hinter) pause(ctx context.Context) error {
	began := time.Now()
	tick := time.NewTimer(hintTick)
	defer tick.Stop()
	select {
	case <-h.changed:
	case <-tick.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	h.pace.waited += time.Since(began)
	h.waited = h.pace.waited
	return nil
}

// ask begins an epoch and announces it.
func (h *hinter) ask() error {
	id, err := h.source.NewHintID()
	if err != nil {
		h.giveUp(err)
		return nil
	}
	if h.mode == HintsAuto {
		if err := h.inspect.begin(h); err != nil {
			return err
		}
	}
	if err := h.tracker.BeginHintEpoch(id); err != nil {
		return err
	}
	h.begun, h.taken, h.earlier = h.tracker.Remaining(), h.tracker.HintStats().Taken, h.passed.Load()
	h.mu.Lock()
	gone := h.off != nil // the driver has been reset meanwhile
	if !gone {
		h.state, h.id, h.asked, h.began, h.stopped = hintsAsked, id, time.Now(), 0, time.Time{}
	}
	h.mu.Unlock()
	if gone {
		h.tracker.EndHintEpoch()
		return nil
	}
	h.source.AnnounceHints(id)
	return nil
}

// headStart waits until the guest has ended its answer, but no longer than allowed,
// and not for a guest that does not begin. Nothing is sent meanwhile: the pages that
// are known not to be free are those written just now, which will be written again.
func (h *hinter) headStart(ctx context.Context) error {
	began := time.Now()
	defer func() { h.waited = time.Since(began) }()
	limit := time.NewTimer(h.wait)
	defer limit.Stop()
	begin := time.NewTimer(h.wait / 4)
	defer begin.Stop()
	tick := time.NewTicker(hintTick)
	defer tick.Stop()
	for {
		state, off := h.where()
		if off || state == hintsEnded {
			return h.look()
		}
		select {
		case <-h.changed:
		case <-tick.C:
			if err := h.look(); err != nil {
				return err
			}
		case <-begin.C:
			if state == hintsAsked {
				return nil
			}
		case <-limit.C:
			return h.look()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (h *hinter) where() (s hintState, off bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state, h.off != nil
}

// again reports whether to ask once more. While the guest still answers, its hints
// count in any round; a new id is for a guest that has ended its answer.
func (h *hinter) again(bandwidth float64) bool {
	h.mu.Lock()
	state, answer, off, stopped := h.state, h.answer, h.off != nil, h.stopped
	h.mu.Unlock()
	if off {
		return false
	}
	if state != hintsEnded {
		if !stopped.IsZero() && time.Since(stopped) > stopPatience {
			h.giveUp(errHintsSilent)
		}
		return false
	}
	remaining := h.tracker.Remaining()
	round := time.Duration(float64(remaining*mempage.Size) / max(bandwidth, 1) * float64(time.Second))
	if round < 2*answer {
		return false // the round would end before the guest has answered
	}
	return h.mode == HintsOn || (h.tracker.HintStats().Taken-h.taken)*payingShare >= h.begun
}

// look gives up, in mode auto, if hints cost more than they save.
func (h *hinter) look() error {
	if h.mode != HintsAuto {
		return nil
	}
	if _, off := h.where(); off {
		return nil
	}
	worse, err := h.inspect.worse(h)
	if err == nil && worse {
		h.giveUp(errHintsZeroed)
	}
	return err
}

// giveUp ends the hints of this migration. Pages that were taken out stay out.
func (h *hinter) giveUp(why error) {
	h.mu.Lock()
	if h.off == nil {
		h.off = why
	}
	h.mu.Unlock()
	h.stop()
}

// stop ends the epoch before the vCPUs stop, and tells the guest.
func (h *hinter) stop() {
	if h.source == nil {
		return
	}
	h.tracker.EndHintEpoch()
	h.mu.Lock()
	tell := h.state != hintsIdle && h.stopped.IsZero()
	if tell {
		h.stopped = time.Now()
	}
	h.mu.Unlock()
	if tell {
		h.source.StopHints()
	}
}

// done lets the guest use its pages again where it runs next. It is called while the
// guest is stopped, before the state is saved: the guest learns of it at the
// destination, or here after this migration has failed.
func (h *hinter) done() {
	if h.everAsked() {
		h.source.DoneHints()
		h.toldDone = true
	}
}

// undone takes done back, before the guest goes on at the source and the migration with
// it: the guest has not learnt of it.
func (h *hinter) undone() {
	if h.toldDone {
		h.source.StopHints()
		h.toldDone = false
	}
}

func (h *hinter) everAsked() bool {
	state, _ := h.where()
	return h.source != nil && state != hintsIdle
}

// finish ends the hints of a migration that is over. If stays, the guest goes on here
// and may use its pages again.
func (h *hinter) finish(stays bool) {
	if h.source != nil {
		h.stop()
		if stays {
			h.done()
		}
		h.source.SetHintSink(nil)
	}
	h.report()
}

// report puts the counters into the result.
func (h *hinter) report() {
	s := h.tracker.HintStats()
	h.mu.Lock()
	off := h.off
	if off == nil && h.state == hintsAsked {
		off = errHintsSilent
	}
	h.mu.Unlock()
	dropped := h.dropped.Load()
	unused := h.passed.Load() - s.Taken - s.Written - s.Stale // sent before, or hinted twice
	h.meter.update(func(m *meter) {
		r := &m.result
		r.PagesHinted = s.Taken - s.Returned
		r.HintsReceived = h.named.Load() + dropped
		r.HintsLate = s.Stale + dropped + unused
		r.HintsRewritten = s.Returned + s.Written
		r.HintWait = h.waited
		if off != nil {
			r.HintsOff = off.Error()
		}
	})
}

// HintStart implements [mempage.HintSink].
func (h *hinter) HintStart(id uint32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if id == h.id && h.state == hintsAsked {
		h.state, h.began = hintsAnswering, max(1, time.Since(h.asked))
		h.signal()
	}
}

// HintStop implements [mempage.HintSink].
func (h *hinter) HintStop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state == hintsAnswering {
		h.state, h.answer = hintsEnded, time.Since(h.asked)
		h.signal()
	}
}

// HintLost implements [mempage.HintSink].
func (h *hinter) HintLost() {
	h.tracker.EndHintEpoch()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.off == nil {
		h.off = errHintsGone
	}
	h.signal()
}

// signal wakes headStart or pause. It needs mu.
func (h *hinter) signal() {
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

// HintLate implements [mempage.HintSink].
func (h *hinter) HintLate(pages uint64) { h.dropped.Add(pages) }

// HintPages implements [mempage.HintSink]. Holes are left out: they cost nothing on the
// wire, and no hint kept them off it. Looking at a page before it is armed does no
// harm here: a page that is left out is still sent if it is written.
func (h *hinter) HintPages(id uint32, ranges []mempage.Range) {
	state, _ := h.where()
	h.pages = h.pages[:0]
	for _, r := range ranges {
		h.pages = appendPages(h.pages, h.slots, r)
	}
	for _, r := range h.pages {
		if state != hintsAnswering {
			h.dropped.Add(r.n)
			continue
		}
		h.named.Add(r.n)
		for first, end := r.first, r.first+r.n; first < end; first += hintSpan {
			h.span(id, r.slot, first, min(hintSpan, end-first))
		}
	}
	h.flush(id)
}

// span adds the pages of a range that are not holes to the batch.
func (h *hinter) span(id uint32, slot int, first, n uint64) {
	words := mempage.Bitmap(h.populated[:mempage.Words(n)])
	if err := h.ram.Populated(slot, first, n, words); err != nil {
		// The sender will meet the error when it comes to these pages.
		clear(words)
		words.SetRange(0, n)
	}
	for at := words.NextSet(0, n); at < n; {
		end := words.NextClear(at, n)
		h.batch = append(h.batch, pageRange{slot, first + at, end - at})
		h.batched += end - at
		if len(h.batch) == hintBatch || h.batched >= hintBatchPages {
			h.flush(id)
		}
		at = words.NextSet(end, n)
	}
}

// flush passes the batch to the tracker.
func (h *hinter) flush(id uint32) {
	if len(h.batch) == 0 {
		return
	}
	h.passed.Add(h.batched)
	taken := h.tracker.HintBatch(id, h.batch)
	h.inspect.note(h.batch)
	h.batch, h.batched = h.batch[:0], 0
	h.meter.hinted(taken)
}
