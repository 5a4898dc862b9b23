package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/mempage"
)

// serving is a source's side of memory that comes later: it announces what will be missing,
// answers what the destination wants, and sends the rest. The destination's side is [intake].
//
// Until COMMIT the stop may be undone: what is sent by then is still to be sent (R7).
// Afterwards the guest never runs here again, and what a page has here is final: it is sent
// once, or again if the destination asks for it, or says that it has not arrived.
type serving struct {
	m        *Migration
	p        *precopy
	slots    []Slot
	channels int
	limit    *limiter

	servingMu sync.Mutex // guards the fields below
	number    uint32     // of the last set
	set       *outSet
	left      [][]uint64 // what has not been sent; nil: nothing has been announced
	pages     uint64     // in left
	armed     bool       // the guest stands still, and what was announced may be sent
	committed bool
	slot      int // where the rest goes on
	page      uint64
	stalls    Stalls
	whole     bool
	moved     uint64 // pages that were sent on request, and for the rest, in all sets
	wanted    uint64
}

// outSet is one set of connections.
type outSet struct {
	s       *serving
	control *conn
	lanes   []*conn
	ctx     context.Context
	cancel  context.CancelCauseFunc
	pulse   *pulse
	readers sync.WaitGroup
	ending  sync.Once

	// answering is held from when a page is looked at until it is written, and while a list
	// is written: no page of a stop that was undone comes after the next stop's list.
	answering sync.Mutex
	answerer  *pourer         // guarded by answering
	lists     chan [][]uint64 // what the destination lacks
	dropped   chan struct{}   // it has forgotten what a preliminary list named
}

// openSet makes a set of connections.
func (s *serving) openSet(ctx context.Context, d *dialer) (*outSet, error) {
	s.servingMu.Lock()
	s.number++
	hello := newHello(purposeMissing, s.m.session)
	hello.channel, hello.set, hello.alive, hello.dataChannels = 1, s.number, aliveInterval(s.m.opt.PeerTimeout), uint16(s.channels)
	s.servingMu.Unlock()
	c, err := d.connect(ctx, hello)
	if err != nil {
		return nil, err
	}
	set := &outSet{s: s, control: c, lists: make(chan [][]uint64, 1), dropped: make(chan struct{}, 1), answerer: s.newPourer()}
	set.ctx, set.cancel = context.WithCancelCause(ctx)
	context.AfterFunc(set.ctx, func() { c.Close() })
	smallBuffers(c)
	_ = c.SetReadDeadline(time.Now().Add(s.m.opt.PeerTimeout))
	r, err := readReplyOf(c, frameHelloOK)
	var ok helloOK
	if err == nil {
		err = decodeControl(r.typ, r.payload, &ok)
	}
	if err != nil {
		set.cancel(err)
		return nil, err
	}
	_ = c.SetReadDeadline(time.Time{})
	set.pulse = startPulse(c, s.m.opt.PeerTimeout, func() bool { return true }, nil, set.cancel)
	set.pulse.beat(ok.Alive)
	for i := range s.channels {
		hello.channel = uint16(i + 2)
		lane, err := d.connect(set.ctx, hello)
		if err != nil {
			set.cancel(err)
			set.close()
			return nil, err
		}
		set.lanes = append(set.lanes, lane)
		set.pulse.add(lane.flow)
		context.AfterFunc(set.ctx, func() { lane.Close() })
		set.readers.Go(func() {
			_, err := readReplyOf(lane, 0) // nothing comes but REFUSED, or the end
			set.cancel(err)
		})
	}
	set.readers.Go(func() { set.cancel(set.read()) })
	s.servingMu.Lock()
	s.set = set
	s.servingMu.Unlock()
	return set, nil
}

// smallBuffers keeps what is written from waiting long in the kernel.
func smallBuffers(c *conn) {
	if b, ok := c.flow.Conn.(interface{ SetWriteBuffer(int) error }); ok {
		_ = b.SetWriteBuffer(256 << 10)
	}
}

// readReplyOf reads one frame of a type; ALIVE is left out, REFUSED is an error.
func readReplyOf(c *conn, want frameType) (reply, error) {
	for {
		h, err := c.readHeader()
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("the destination closed the connection")
		}
		if err != nil {
			return reply{}, err
		}
		if h.typ == frameAlive {
			continue
		}
		b, err := c.readPayload(h, maxControl)
		if err != nil {
			return reply{}, err
		}
		if h.typ == frameRefused {
			var no refused
			if err := decodeControl(h.typ, b, &no); err != nil {
				return reply{}, err
			}
			return reply{}, refusal(no.Reasons)
		}
		if h.typ != want {
			return reply{}, fmt.Errorf("%w: the destination sent %v", ErrProtocol, h.typ)
		}
		return reply{h, b}, nil
	}
}

// close ends the set, and returns when nothing of it is under way.
func (o *outSet) close() {
	o.cancel(errOver)
	o.readers.Wait()
	o.ending.Do(o.pulse.end)
}

// read reads what the destination sends.
func (o *outSet) read() error {
	s := o.s
	list := missingList{slots: s.slots}
	for {
		f, err := o.control.readHeader()
		if err != nil {
			return lostDestination(err)
		}
		switch f.typ {
		case frameAlive:
			err = o.pulse.took(f)
		case frameWant:
			if err = checkWant(f, s.slots); err == nil {
				err = o.answer(f)
			}
		case frameMissing:
			var whole bool
			if whole, err = list.add(o.control, f); err == nil && whole {
				bits := list.take()
				if f.flags&flagPreliminary != 0 {
					select {
					case o.dropped <- struct{}{}:
					default:
					}
				} else {
					select {
					case o.lists <- bits:
					default:
						err = fmt.Errorf("%w: a second list of what the destination lacks", ErrProtocol)
					}
				}
			}
		case frameStalls, frameWhole:
			var b []byte
			if b, err = o.control.readPayload(f, maxControl); err == nil {
				var st Stalls
				if err = strictcbor.UnmarshalKnown(b, &st); err != nil {
					err = fmt.Errorf("%w: %v: %v", ErrProtocol, f.typ, err)
				}
				s.told(st, f.typ == frameWhole && err == nil)
			}
			if err == nil && f.typ == frameWhole {
				return errWhole
			}
		default:
			err = fmt.Errorf("%w: the destination sent %v (%d bytes) on a connection for memory that comes later", ErrProtocol, f.typ, f.length)
		}
		if err != nil {
			return err
		}
	}
}

// errWhole ends a set when the destination lacks nothing any more.
var errWhole = errors.New("the destination has all of the guest's memory")

func lostDestination(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the destination closed the connection")
	}
	return err
}

// told takes what the destination says of its threads.
func (s *serving) told(st Stalls, whole bool) {
	s.servingMu.Lock()
	defer s.servingMu.Unlock()
	s.stalls, s.whole = st, s.whole || whole
}

// answer sends pages that somebody waits for, and some around them.
func (o *outSet) answer(f header) error {
	o.answering.Lock()
	defer o.answering.Unlock()
	for page := f.first; page < f.first+uint64(f.count); {
		w := page / 64
		wanted := mempage.WordMask(w, page, min(f.first+uint64(f.count), (w+1)*64))
		page = (w + 1) * 64
		mask := o.s.takeWanted(int(f.slot), w, wanted)
		if mask == 0 {
			continue
		}
		if err := o.send(o.control, o.answerer, int(f.slot), w*64, []uint64{mask}); err != nil {
			return err
		}
	}
	return nil
}

// takeWanted returns which pages of a word to send: those that are wanted, and their
// neighbours that have not been sent.
func (s *serving) takeWanted(slot int, w, wanted uint64) uint64 {
	s.servingMu.Lock()
	defer s.servingMu.Unlock()
	if !s.armed {
		return 0 // of a stop that was undone
	}
	var near uint64
	for i := 0; i < 64; i += wantedPages {
		if group := uint64(1<<wantedPages-1) << i; wanted&group != 0 {
			near |= group
		}
	}
	send := wanted | s.left[slot][w]&near
	if s.committed { // R7
		s.take(slot, w, send)
		s.slot, s.page = slot, w*64
	}
	s.wanted += uint64(popcount(send))
	return send
}

// take notes that pages are sent. It needs servingMu.
func (s *serving) take(slot int, w, mask uint64) {
	s.pages -= uint64(popcount(s.left[slot][w] & mask))
	s.left[slot][w] &^= mask
}

// nextBulk takes the next pages that nobody waits for. n is 0 if there are none.
func (s *serving) nextBulk(picked []uint64) (slot int, first, n uint64) {
	s.servingMu.Lock()
	defer s.servingMu.Unlock()
	for range len(s.slots) + 1 {
		bits := mempage.Bitmap(s.left[s.slot])
		pages := s.slots[s.slot].Pages
		if next := bits.NextSet(s.page, pages); next < pages {
			w := next / 64
			last := min(w+bulkPages/64, uint64(len(bits)))
			clear(picked[copy(picked, bits[w:last]):])
			for i := w; i < last; i++ {
				s.take(s.slot, i, bits[i])
			}
			s.page = last * 64
			s.moved += mempage.Bitmap(picked).Count()
			return s.slot, w * 64, min(last*64, pages) - w*64
		}
		s.slot, s.page = (s.slot+1)%len(s.slots), 0
	}
	return 0, 0, 0
}

// send writes the pages of a span that mask has.
func (o *outSet) send(c *conn, w *pourer, slot int, first uint64, mask []uint64) error {
	pages := min(uint64(len(mask))*64, o.s.slots[slot].Pages-first)
	words := int(mempage.Words(pages))
	copy(w.picked[:words], mask)
	ram := o.s.m.src
	if err := ram.Populated(slot, first, pages, w.populated[:words]); err != nil {
		return err
	}
	span := ram.Bytes(slot, first, pages)
	return guard(ram, slot, first, span, func() error {
		data, zero, _ := w.classify(span, w.sent[:words], words)
		o.s.m.meter.span(data, zero, 0)
		meta := w.meta.encode(uint32(pages))
		h := header{typ: framePages, slot: uint16(slot), first: first, count: uint32(pages), length: uint32(uint64(len(meta)) + data*mempage.Size)}
		return c.writeSpan(h, meta, w.bufs)
	})
}

// pourer looks at pages and sends them.
type pourer struct {
	worker
	sent mempage.Bitmap // all of them: a hole is a page of zeros, since it is missing at the destination
}

func (s *serving) newPourer() *pourer {
	return &pourer{worker{sender: s.p.sender}, slices.Repeat(mempage.Bitmap{^uint64(0)}, bulkPages/64)}
}

// pour sends what nobody waits for, by one connection.
func (o *outSet) pour(c *conn) error {
	w := o.s.newPourer()
	var picked [bulkPages / 64]uint64
	for {
		if err := context.Cause(o.ctx); err != nil {
			return err
		}
		slot, first, n := o.s.nextBulk(picked[:])
		if n == 0 {
			return nil
		}
		before := c.flow.sent.Load()
		if err := o.send(c, w, slot, first, picked[:mempage.Words(n)]); err != nil {
			return err
		}
		if err := o.s.limit.wait(o.ctx, c.flow.sent.Load()-before); err != nil {
			return err
		}
	}
}

// run sends the rest, and answers, until the destination lacks nothing or the set is lost.
func (o *outSet) run() error {
	var pours sync.WaitGroup
	for _, c := range o.lanes {
		pours.Go(func() {
			if err := o.pour(c); err != nil {
				o.cancel(err)
			}
		})
	}
	<-o.ctx.Done()
	pours.Wait()
	o.close()
	if err := context.Cause(o.ctx); !errors.Is(err, errWhole) {
		return err
	}
	return nil
}
