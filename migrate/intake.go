package migrate

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/govmm/govmm/internal/strictcbor"
)

// intake is a destination's side of memory that comes later: what the source announces
// will be missing, and how it comes. It belongs to a session, and outlives it if the guest
// arrives, until nothing is missing.
//
// Its connections are a set: one on which the source announces, this side asks for what
// somebody waits for, and the answers come; and others for the rest. When one of a set is
// lost, all are, and the source makes another set: this side says what it lacks, and
// everything that was under way comes again.
type intake struct {
	id      sessionID
	from    identity // the session's source; no other may make a set
	timeout time.Duration
	target  Latecomer
	slots   []Slot
	lost    func(c *conn, m Missing, why error) // says that a set is lost

	intakeMu sync.Mutex // guards the fields below
	number   uint32     // of the last set
	set      *inSet     // nil: there is none
	list     [][]uint64 // the last that was announced, of stop
	stop     uint64
	changed  chan struct{} // closed when list, missing or over changes
	missing  Missing       // nil: nothing is missing
	over     bool          // there will be no further set
	wants    []header      // to be written
	asked    chan struct{} // holds one: wants is not empty, or whole is true
}

// inSet is one set of connections.
type inSet struct {
	in      *intake
	number  uint32
	control *conn
	ctx     context.Context // ends with the first loss, which is its cause
	cancel  context.CancelCauseFunc
	conns   sync.WaitGroup // that are read
	pulse   *pulse
	joined  uint32 // a bit for each connection that has come; guarded by the intake's intakeMu
}

func newIntake(id sessionID, from identity, timeout time.Duration, target Latecomer) *intake {
	return &intake{id: id, from: from, timeout: timeout, target: target, slots: target.Slots(),
		changed: make(chan struct{}), asked: make(chan struct{}, 1)}
}

// latecomer returns the target as one whose memory may come later, or why it is not.
func latecomer(target Target) (Latecomer, error) {
	l, ok := target.(Latecomer)
	if !ok {
		return nil, openly("memory that comes later (%s) is not possible with this machine", featurePostcopy)
	}
	return l, l.CheckMissing()
}

// announce wakes those who wait for a change. It needs intakeMu.
func (in *intake) announce() {
	close(in.changed)
	in.changed = make(chan struct{})
}

// arm makes missing what the source has announced for a stop, or will.
func (in *intake) arm(ctx context.Context, stop uint64) error {
	for {
		in.intakeMu.Lock()
		list, of, changed, over := in.list, in.stop, in.changed, in.over
		in.intakeMu.Unlock()
		switch {
		case over:
			return openly("the connections for memory that comes later have ended")
		case list != nil && of == stop:
			m, err := in.target.Miss(list, in.want)
			if err != nil {
				return &stepError{"make memory missing", err}
			}
			in.intakeMu.Lock()
			in.missing, in.list = m, nil
			in.announce()
			in.intakeMu.Unlock()
			go func() {
				<-m.Gone()
				in.signal()
			}()
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// disarm gives up what is missing: the source has undone its stop, or the session has
// failed.
func (in *intake) disarm() error {
	in.intakeMu.Lock()
	m := in.missing
	in.missing, in.wants = nil, nil
	in.announce()
	in.intakeMu.Unlock()
	if m == nil {
		return nil
	}
	return m.Stop()
}

// end is disarm for good.
func (in *intake) end() {
	if in == nil {
		return
	}
	in.intakeMu.Lock()
	in.over = true
	set := in.set
	in.intakeMu.Unlock()
	_ = in.disarm() // its memory goes
	if set != nil {
		set.fail(errOver)
		set.conns.Wait()
	}
}

// finish ends an intake whose guest has ended: the source is told that nothing is missing
// any more, if that is possible in a moment.
func (in *intake) finish() {
	if in == nil {
		return
	}
	in.intakeMu.Lock()
	in.over = true
	m, set := in.missing, in.set
	in.intakeMu.Unlock()
	if m != nil {
		_ = m.Stop()
	}
	if set == nil {
		return
	}
	t := time.AfterFunc(endGrace, func() { set.fail(errEnding) })
	defer t.Stop()
	set.conns.Wait()
}

// want is called for pages that somebody waits for.
func (in *intake) want(slot int, first, n uint64) {
	in.intakeMu.Lock()
	for n > 0 {
		part := min(n, maxSpan)
		in.wants = append(in.wants, header{typ: frameWant, slot: uint16(slot), first: first, count: uint32(part)})
		first, n = first+part, n-part
	}
	in.intakeMu.Unlock()
	in.signal()
}

func (in *intake) signal() {
	select {
	case in.asked <- struct{}{}:
	default:
	}
}

// armed returns what is missing, nil if nothing is.
func (in *intake) armed() Missing {
	in.intakeMu.Lock()
	defer in.intakeMu.Unlock()
	return in.missing
}

// serve serves a connection of a set until the set ends.
func (in *intake) serve(h hello, c *conn) error {
	if h.channel == 1 {
		return in.begin(h, c)
	}
	in.intakeMu.Lock()
	set := in.set
	if in.over || set == nil || set.number != h.set || int(h.channel) > MaxChannels+1 || set.joined>>h.channel&1 != 0 {
		in.intakeMu.Unlock()
		return fmt.Errorf("%w: connection %d of set %d for session %v, which is not under way", ErrProtocol, h.channel, h.set, in.id)
	}
	set.joined |= 1 << h.channel // each once: they are no more than a source needs
	set.conns.Add(1)
	in.intakeMu.Unlock()
	defer set.conns.Done()
	set.pulse.add(c.flow)
	stop := context.AfterFunc(set.ctx, func() { c.Close() })
	defer stop()
	set.fail(fmt.Errorf("connection %d: %w", h.channel, closedBySource(set.receive(c, false))))
	return nil
}

// begin makes c the control connection of a new set, which takes the place of the last one.
func (in *intake) begin(h hello, c *conn) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	set := &inSet{in: in, number: h.set, control: c, ctx: ctx, cancel: cancel}
	in.intakeMu.Lock()
	last := in.set
	if in.over || h.set <= in.number {
		number := in.number
		in.intakeMu.Unlock()
		cancel(nil)
		return fmt.Errorf("%w: set %d of connections for session %v, the last was %d", ErrProtocol, h.set, in.id, number)
	}
	in.number, in.set = h.set, set
	set.conns.Add(1)
	set.pulse = startPulse(c, in.timeout, func() bool { return in.armed() != nil }, nil, set.fail)
	in.intakeMu.Unlock()
	defer set.conns.Done()
	defer set.pulse.end()
	if last != nil {
		last.fail(openly("the source has made other connections"))
		last.conns.Wait() // nothing of it lands any more
	}
	stop := context.AfterFunc(set.ctx, func() { c.Close() })
	defer stop()
	var writing sync.WaitGroup
	defer writing.Wait()
	defer set.fail(errOver)
	set.fail(set.greet(h, &writing))
	if set.ctx.Err() == nil {
		set.fail(closedBySource(set.receive(c, true)))
	}
	if m := in.armed(); m != nil && !isClosed(m.Gone()) && m.Left() > 0 {
		in.lost(c, m, context.Cause(set.ctx))
	}
	return nil
}

// fail ends the set, if there is an error.
func (s *inSet) fail(err error) {
	if err != nil {
		s.cancel(err)
	}
}

// greet says what this side lacks, and begins to ask for what somebody waits for.
func (s *inSet) greet(h hello, writing *sync.WaitGroup) error {
	in := s.in
	if err := s.control.writeControl(frameHelloOK, helloOK{Version: Version, Alive: aliveInterval(in.timeout)}); err != nil {
		return err
	}
	s.pulse.beat(h.alive)
	in.intakeMu.Lock()
	m := in.missing
	in.wants = nil
	in.intakeMu.Unlock()
	if m != nil {
		bits := newBits(in.slots)
		for slot := range bits {
			m.Lacks(slot, bits[slot])
		}
		if err := sendMissing(s.control, bits, header{}); err != nil {
			return err
		}
		m.Anew()
	}
	writing.Go(func() { s.fail(s.ask()) })
	return nil
}

// stallsEvery is how often the source is told how long threads wait.
const stallsEvery = 250 * time.Millisecond

// ask writes what somebody waits for, and, now and then, for how long. It ends when nothing
// is missing any more.
func (s *inSet) ask() error {
	in := s.in
	t := time.NewTicker(stallsEvery)
	defer t.Stop()
	for {
		tick := false
		select {
		case <-in.asked:
		case <-t.C:
			tick = true
		case <-s.ctx.Done():
			in.signal() // for the next set
			return nil
		}
		in.intakeMu.Lock()
		wants, m := in.wants, in.missing
		in.wants = nil
		in.intakeMu.Unlock()
		for _, w := range wants {
			if err := s.control.writeFrame(w); err != nil {
				return err
			}
		}
		if m == nil {
			continue
		}
		whole := isClosed(m.Gone())
		if !tick && !whole {
			continue
		}
		b, err := strictcbor.Marshal(m.Stalls())
		if err != nil {
			return err
		}
		typ := frameStalls
		if whole {
			typ = frameWhole
		}
		if err := s.control.writeFrame(header{typ: typ}, b); err != nil || whole {
			return err
		}
	}
}

// receive reads what the source sends on a connection.
func (s *inSet) receive(c *conn, control bool) error {
	in := s.in
	var l landing
	list := missingList{slots: in.slots}
	for {
		f, err := c.readHeader()
		if err != nil {
			return err
		}
		switch {
		case f.typ == frameAlive && control:
			err = s.pulse.took(f)
		case f.typ == framePages:
			var content []byte
			if content, err = l.read(c, f, in.slots); err != nil {
				break
			}
			// What comes when nothing is missing is of a stop that was undone.
			if m := in.armed(); m != nil {
				if err = l.land(m, f, content); err != nil && m.Left() == 0 {
					err = nil
				}
			}
		case f.typ == frameMissing && control:
			var whole bool
			if whole, err = list.add(c, f); err == nil && whole {
				err = s.announced(f, list.take())
			}
		default:
			err = fmt.Errorf("%w: the source sent %v (%d bytes) for memory that comes later", ErrProtocol, f.typ, f.length)
		}
		if err != nil {
			return err
		}
	}
}

// announced takes a list that is whole.
func (s *inSet) announced(f header, bits [][]uint64) error {
	in := s.in
	if f.flags&flagPreliminary == 0 {
		in.intakeMu.Lock()
		defer in.intakeMu.Unlock()
		in.list, in.stop = bits, f.first
		in.announce()
		return nil
	}
	if in.armed() != nil {
		return fmt.Errorf("%w: preliminary MISSING while memory is missing", ErrProtocol)
	}
	for slot := range bits {
		if !slices.ContainsFunc(bits[slot], func(w uint64) bool { return w != 0 }) {
			continue
		}
		if err := in.target.Drop(slot, bits[slot]); err != nil {
			return &stepError{"forget memory that comes later", err}
		}
	}
	return s.control.writeFrame(header{typ: frameMissing, flags: flagEnd | flagPreliminary})
}

// intakeOf finds the intake of the session under way, or of the one whose guest has arrived.
func (r *Receiver) intakeOf(h hello, c *conn) (*intake, error) {
	r.sessionMu.Lock()
	defer r.sessionMu.Unlock()
	in := r.tail
	if r.active != nil && r.active.later() != nil {
		in = r.active.later()
	}
	if in == nil || subtle.ConstantTimeCompare(in.id[:], h.session[:]) != 1 {
		return nil, fmt.Errorf("%w: connection for memory of session %v, of which none is missing here", ErrProtocol, h.session)
	}
	if in.from != c.from {
		return nil, fmt.Errorf("%w: connection for memory that comes later: %w", ErrProtocol, errOtherPeer)
	}
	return in, nil
}

// finishTail ends the intake of the guest that has arrived, with the receiver.
func (r *Receiver) finishTail() {
	r.sessionMu.Lock()
	in := r.tail
	r.sessionMu.Unlock()
	in.finish()
}

// later returns the session's intake, nil if its memory does not come later.
func (s *session) later() *intake { return s.intake.Load() }

// loadState loads the state. If it says that memory comes later, what is missing is armed
// before: loading touches some of it, and waits for that. It returns an UNDO that came
// meanwhile.
func (s *session) loadState(target Target, state []byte) (undo header, err error) {
	if s.flags&flagLater != 0 {
		in := s.later()
		if in == nil {
			return undo, fmt.Errorf("%w: memory that comes later, which CONFIG does not name", ErrProtocol)
		}
		s.idle.Store(true) // for the list
		err := in.arm(s.ctx, s.stop)
		s.idle.Store(false)
		if err != nil {
			return undo, err
		}
		loaded, watched := make(chan struct{}), make(chan struct{})
		var came header
		var stuck error
		go func() {
			defer close(watched)
			came, stuck = s.whileLoading(in, loaded)
		}()
		defer func() {
			close(loaded)
			<-watched
			if undo = came; undo.typ == frameUndo {
				err = nil // whatever was loaded does not count
			} else if stuck != nil { // it may have found zeros
				err = stuck
			}
		}()
	}
	if err := target.LoadState(s.ctx, state); err != nil {
		return undo, &stepError{"load the machine's state", err}
	}
	return undo, nil
}

// prepareLater makes the session's intake, if CONFIG names it; it frees the target if that
// is not possible here.
func (s *session) prepareLater(r *Receiver, target Target) error {
	if !slices.Contains(s.features, featurePostcopy) {
		return nil
	}
	l, err := latecomer(target)
	if err != nil {
		return errors.Join(err, target.Discard())
	}
	in := newIntake(s.id, s.conn.from, s.timeout, l)
	in.lost = func(c *conn, m Missing, why error) {
		r.warn("the rest of the guest's memory does not come; the guest stands still where it needs it, until the source connects again", c.RemoteAddr(),
			fmt.Errorf("%d pages are missing: %w", m.Left(), why))
	}
	s.intake.Store(in)
	return nil
}
