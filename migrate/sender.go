package migrate

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/govmm/govmm/mempage"
)

// sender puts pages on the wire. Workers take spans of pages from the tracker, one
// after another, and each writes its span to a connection that is free. So a slow
// connection gets fewer spans and delays no other, and one that makes no progress
// at all ends the migration by its time-out.
//
// Any page may go by any connection: a page is picked at most once between two
// barriers ([sender.flush]), and the destination reads nothing that follows a
// barrier, on any connection, before everything that precedes it has landed.
type sender struct {
	ram     RAM
	slots   []Slot
	tracker *tracker
	meter   *meter
	limit   *limiter
	batch   uint64 // most pages of one frame; a multiple of 64

	// sent has a bit for every page that was ever sent, as data or zero: when it is a
	// hole later, it must go as ZERO (R6). A word belongs to the worker that picked
	// its pages.
	sent []mempage.Bitmap

	lanes   []*lane
	idle    chan *lane // those that no worker writes to
	room    func(n *lane, bytes uint64) (*conn, error)
	workers []*worker
	packing chan struct{} // holds one for each worker that compresses
	// halted ends a pass before its end: no further span is picked.
	halted atomic.Bool
	// ended is called when a connection breaks. It returns the best known reason.
	ended func(error) error
	moved moved

	// admit is called before each pick, if set. It may wait, and returns how many pages may
	// be picked at most.
	admit func(context.Context) (most uint64, err error)
	// turn holds one while a worker uses stage: while it waits to be admitted and while it
	// picks, not while it sends.
	turn  chan struct{}
	stage *stage // where the pass is

	// Of the goroutine that prepares stages.
	preparing sync.WaitGroup
	before    func(slot int) error // called for each slot before its first page is picked, if set
	stretch   uint64               // pages of a stage, a power of two: a chunk if it is not very small or large
	holes     HoleFinder           // nil: there is none
	leaps     bool                 // this pass leaves out large holes, with the help of holes
	picked    [maxClear / mempage.WordBits]uint64
}

// newSender makes a sender over the link's data connections, with a worker for each.
// With compression there are more: they compress while others write.
func newSender(ram RAM, t *tracker, l *link, m *meter, opt Options) (*sender, error) {
	s := &sender{ram: ram, slots: ram.Slots(), tracker: t, meter: m, batch: maxSpan,
		lanes: l.data, idle: make(chan *lane, len(l.data)), room: l.room, ended: l.channelEnded, turn: make(chan struct{}, 1),
		stretch: min(maxClear, max(maxSpan, uint64(1)<<opt.ClearBitmapShift))}
	s.holes, s.leaps = ram.(HoleFinder)
	for _, slot := range s.slots {
		s.sent = append(s.sent, mempage.NewBitmap(slot.Pages))
	}
	if opt.BandwidthLimit > 0 {
		s.limit = &limiter{rate: opt.BandwidthLimit}
		// About twenty frames a second, so that bytes flow evenly.
		s.batch = min(maxSpan, max(64, opt.BandwidthLimit/20/mempage.Size/64*64))
	}
	n := len(s.lanes)
	if opt.Compression != CompressNone {
		var atOnce int
		n, atOnce = compressors(runtime.GOMAXPROCS(0), n)
		s.packing = make(chan struct{}, atOnce)
		s.batch = min(s.batch, packSpan)
	}
	for range n {
		w := &worker{sender: s}
		if opt.Compression != CompressNone {
			var err error
			if w.packer, err = newPacker(opt.Compression); err != nil {
				return nil, err
			}
		}
		s.workers = append(s.workers, w)
	}
	for _, n := range s.lanes {
		s.idle <- n
	}
	return s, nil
}

// maxFew is how many pages one worker sends sooner than others wake: the last ones of an idle
// guest, which stands still meanwhile.
const maxFew = 64

// send sends the pages that the tracker has to send, from the first page of memory
// to the last, and returns when all of them have been written. before is called for
// each slot before any of its pages is picked. After an error the migration is over:
// pages were picked that have not been sent. If the sender is halted, what was picked has
// been sent.
func (s *sender) send(ctx context.Context, limit *limiter, before func(slot int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.before = before
	s.stage = s.prepare(ctx, 0, 0)
	defer func() { s.leaps = false }()
	defer s.preparing.Wait()
	work := func(w *worker) {
		if err := w.run(ctx, limit); err != nil {
			cancel(err) // the first one is the reason
		}
	}
	workers := s.workers
	if s.tracker.Remaining() <= maxFew {
		workers = workers[:1]
	}
	var all sync.WaitGroup
	for _, w := range workers[1:] {
		all.Go(func() { work(w) })
	}
	work(workers[0])
	all.Wait()
	return context.Cause(ctx)
}

// next picks the next span. n is 0 when the pass is over.
func (s *sender) next(ctx context.Context, picked []uint64) (slot int, first, n uint64, err error) {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, 0, 0, context.Cause(ctx)
	}
	defer func() { <-s.turn }()
	batch := s.batch
	if s.admit != nil {
		most, err := s.admit(ctx)
		if err != nil {
			return 0, 0, 0, err
		}
		batch = min(batch, most)
	}
	for {
		st := s.stage
		select {
		case <-st.ready:
		case <-ctx.Done():
			return 0, 0, 0, context.Cause(ctx)
		}
		if st.err != nil || st.slot == len(s.slots) {
			return 0, 0, 0, st.err
		}
		// Spans end at multiples of the batch, so that no two of them share a huge
		// page, here or at the destination.
		most := batch - st.from&^(mempage.WordBits-1)%batch
		first, n, err := s.tracker.PickBefore(st.slot, st.from, st.end, most, picked)
		if err != nil {
			return 0, 0, 0, err
		}
		st.from = first + n
		// Not sooner than necessary: what the guest writes between a fetch and the sending
		// of a page is sent twice.
		if st.next == nil && (st.end-st.from <= s.stretch/8 || s.tracker.NextToSend(st.slot, st.from, st.end) == st.end) {
			st.next = s.prepare(ctx, st.slot, st.end)
		}
		if n > 0 {
			return st.slot, first, n, nil
		}
		s.stage = st.next
	}
}

// flush ends a round on every connection. The destination confirms the round when
// all that was sent before on all connections has landed; with flagQuiet it does not
// confirm. After flagLast nothing follows on the data connections.
func (s *sender) flush(round int, flags uint8) error {
	h := header{typ: frameRound, flags: flags, first: uint64(round)}
	for _, n := range s.lanes {
		c, err := s.room(n, headerSize)
		if err == nil {
			err = c.writeFrame(h)
		}
		if err != nil {
			return s.ended(fmt.Errorf("data channel %d: %w", n.number, err))
		}
	}
	return nil
}

// worker sends one span at a time, without allocating.
type worker struct {
	*sender
	packer *packer // nil: pages go as they are

	picked, populated [maxSpan / 64]uint64
	meta              spanMeta
	bufs              net.Buffers
}

func (w *worker) run(ctx context.Context, limit *limiter) error {
	for {
		if err := context.Cause(ctx); err != nil || w.halted.Load() {
			return err
		}
		slot, first, n, err := w.next(ctx, w.picked[:])
		if err != nil || n == 0 {
			return err
		}
		sent, err := w.sendSpan(ctx, slot, first, n)
		if err != nil {
			return err
		}
		if err := limit.wait(ctx, sent); err != nil {
			return err
		}
	}
}

// sendSpan sends the picked pages of [first, first+n), and returns how many bytes
// that took. The pages are armed (R1): only from here on may their content be read,
// to find a hole, zeros or data.
func (w *worker) sendSpan(ctx context.Context, slot int, first, n uint64) (bytes uint64, err error) {
	words := spanWords(uint32(n))
	if err := w.ram.Populated(slot, first, n, w.populated[:words]); err != nil {
		return 0, err
	}
	span := w.ram.Bytes(slot, first, n)
	err = guard(w.ram, slot, first, span, func() (err error) {
		bytes, err = w.sendPages(ctx, slot, first, span)
		return err
	})
	return bytes, err
}

// sendPages is sendSpan, for pages that the host may not be able to access.
func (w *worker) sendPages(ctx context.Context, slot int, first uint64, span []byte) (bytes uint64, err error) {
	n := uint64(len(span) / mempage.Size)
	words := spanWords(uint32(n))
	data, zero, hole := w.classify(span, w.sent[slot][first/64:], words)
	w.meter.span(data, zero, hole)
	if data+zero == 0 {
		return 0, nil
	}
	if data > 0 {
		w.moved.begin(data)
		defer w.moved.end(data)
	}
	meta := w.meta.encode(uint32(n))
	h := header{typ: framePages, slot: uint16(slot), first: first, count: uint32(n),
		length: uint32(uint64(len(meta)) + data*mempage.Size)}
	if w.packer != nil && data > 0 {
		select {
		case w.packing <- struct{}{}:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
		packed, err := w.packer.pack(span, w.meta.data[:words])
		<-w.packing
		if err != nil {
			return 0, err
		}
		if packed != nil {
			h.typ, h.flags, h.length = framePacked, w.packer.codec, uint32(len(meta)+len(packed))
			w.bufs = append(w.bufs[:2], packed)
		}
	}
	if w.packer != nil {
		w.meter.packed(data*mempage.Size, uint64(h.length)-uint64(len(meta)))
	}
	var lane *lane
	select {
	case lane = <-w.idle:
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	c, err := w.room(lane, headerSize+uint64(h.length))
	if err != nil {
		return 0, w.ended(err)
	}
	if err := c.writeSpan(h, meta, w.bufs); errors.Is(err, syscall.EFAULT) {
		return 0, err // guard names the page
	} else if err != nil {
		return 0, w.ended(err)
	}
	w.idle <- lane
	return headerSize + uint64(h.length), nil
}

// classify sorts the picked pages of a span into data, zeros and holes, in w.meta,
// and collects the runs of data pages in w.bufs, after room for header and meta.
// sent has the words of sender.sent for the span.
func (w *worker) classify(span []byte, sent mempage.Bitmap, words int) (data, zero, hole uint64) {
	w.bufs = append(w.bufs[:0], nil, nil)
	runStart, runEnd := -1, -1 // of data pages, in pages of the span
	for i := range words {
		picked := w.picked[i]
		gone := picked &^ w.populated[i]
		skipped := gone &^ sent[i] // R6: at the destination it has never been anything but zero
		zeros := gone & sent[i]
		for left := picked & w.populated[i]; left != 0; left &= left - 1 {
			page := i*64 + bits.TrailingZeros64(left)
			if isZero(span[page*mempage.Size:][:mempage.Size]) {
				zeros |= left & -left
				continue
			}
			if page != runEnd {
				w.addRun(span, runStart, runEnd)
				runStart = page
			}
			runEnd = page + 1
		}
		full := picked &^ skipped &^ zeros
		w.meta.data[i], w.meta.zero[i] = full, zeros
		sent[i] |= full | zeros
		data += uint64(bits.OnesCount64(full))
		zero += uint64(bits.OnesCount64(zeros))
		hole += uint64(bits.OnesCount64(skipped))
	}
	w.addRun(span, runStart, runEnd)
	return data, zero, hole
}

func (w *worker) addRun(span []byte, start, end int) {
	if start >= 0 {
		w.bufs = append(w.bufs, span[start*mempage.Size:end*mempage.Size])
	}
}

// moved measures what the link carries.
type moved struct {
	mu    sync.Mutex    // guards what follows
	begun uint64        // pages with content whose write has begun
	ended uint64        // and has ended
	under int           // spans that are being written
	since time.Time     // while under is not 0
	busy  time.Duration // before
}

// begin and end are called around each span.
func (m *moved) begin(pages uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.begun += pages
	if m.under++; m.under == 1 {
		m.since = time.Now()
	}
}

func (m *moved) end(pages uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended += pages
	if m.under--; m.under == 0 {
		m.busy += time.Since(m.since)
	}
}

// progress returns how many pages with content a worker began and ended to write, and the
// time in which one was being written.
func (m *moved) progress() (begun, ended uint64, busy time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	busy = m.busy
	if m.under > 0 {
		busy += time.Since(m.since)
	}
	return m.begun, m.ended, busy
}
