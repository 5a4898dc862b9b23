package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/govmm/govmm/internal/strictcbor"
)

// session is one migration at the destination. Its state moves forward:
//
//	receiving -> prepared -> starting -> running
//	     \            \           \----> aborted
//	      \------------\--------------> aborted
//
// The step out of prepared is made under verdictMu, before any vCPU enters the guest,
// and is never undone. There is one way back, from prepared to receiving: the source has
// undone its stop. It has sent no COMMIT then, and sends none before the next PREPARED.
type session struct {
	id   sessionID
	conn *conn // control

	ctx    context.Context // ends with the first failure, which is its cause
	cancel context.CancelCauseFunc
	pulse  *pulse
	frames chan reply     // from the control connection
	undos  chan reply     // the UNDOs among them, which may come while others do not
	reader sync.WaitGroup // of the control connection
	idle   atomic.Bool    // receive waits for the source
	whole  atomic.Uint64  // frames that have arrived, without ALIVE
	passed atomic.Uint64  // where a pass is: see pass

	features []string // of the protocol, in use; set before a channel is served
	shared   bool     // no page is sent; as features
	timeout  time.Duration
	slots    []Slot
	copies   []DiskCopy // of disks
	ahead    *ahead     // nil: memory is not populated ahead
	wrong    []string
	nWrong   uint64
	compared time.Duration // what comparing the storage took after the pages had landed

	stop    uint64      // the number of the source's stop that the last STATE was of
	storage *comparison // of that stop

	dataMu  sync.Mutex // guards the eight below
	inlets  []*inlet   // by number less one; nil: has not come yet
	missing int        // of inlets
	ended   bool       // no channel may join
	failure error      // of the first channel that failed
	arrived int        // channels whose ROUND has come
	round   roundWait
	last    *lastWait
	said    time.Time // what the source waits for: READY, or the end of a round

	all   chan struct{}  // closed when no channel is missing
	lost  chan struct{}  // closed when failure is set
	ready chan struct{}  // closed when the machine is built: pages may land
	over  chan struct{}  // closed when the session ends
	gone  chan struct{}  // closed when all of it has been freed, or its guest has arrived
	lanes sync.WaitGroup // channels that are served

	verdictMu sync.Mutex // guards state, target, paused
	state     sessionState
	target    Target
	paused    bool
	decided   chan struct{} // closed when the state is the last one
	aborted   chan struct{} // closed when state is stateAborted for good

	wasPrepared bool // PREPARED may have been sent

	intake atomic.Pointer[intake] // of memory that comes later; nil: none does
	flags  uint8                  // of the last STATE
}

type sessionState uint8

const (
	stateReceiving sessionState = iota
	statePrepared
	stateStarting // by COMMIT, or a query
	stateRunning
	stateAborted
)

func newSession(ctx context.Context, id sessionID, c *conn, channels int, timeout time.Duration) *session {
	s := &session{id: id, conn: c, timeout: timeout, frames: make(chan reply), undos: make(chan reply),
		inlets: make([]*inlet, channels), missing: channels, last: newLastWait(), lost: make(chan struct{}),
		all: make(chan struct{}), ready: make(chan struct{}), over: make(chan struct{}), gone: make(chan struct{}), aborted: make(chan struct{}), decided: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	place := newPlaceLimit(timeout)
	s.pulse = startPulse(c, timeout, s.waits, func(waits bool) error {
		return place.look(isClosed(s.ready), waits, s.received(), s.whole.Load())
	}, s.cancel)
	s.reader.Go(s.read)
	context.AfterFunc(s.ctx, s.stopChannels)
	return s
}

// waits reports whether this side waits for the source, and does nothing else.
func (s *session) waits() bool {
	if !s.idle.Load() {
		return false
	}
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	for _, in := range s.inlets {
		if in != nil && !in.waits() {
			return false
		}
	}
	return true
}

// read reads the control connection, so that ALIVE, ABORT and its end are noticed
// whatever this side is at.
func (s *session) read() {
	for config := true; ; config = false {
		f, err := s.readFrame(config)
		if err != nil {
			s.cancel(closedBySource(err))
			return
		}
		to := s.frames
		if f.typ == frameUndo {
			to = s.undos
		}
		select {
		case to <- f:
		case <-s.ctx.Done():
			return
		}
	}
}

// readFrame reads one frame that is no ALIVE. ABORT is an error. A CONFIG may come first
// only.
func (s *session) readFrame(config bool) (reply, error) {
	for {
		h, err := s.conn.readHeader()
		if err != nil {
			return reply{}, err
		}
		most := 0
		switch h.typ {
		case frameAlive:
			if err := s.pulse.took(h); err != nil {
				return reply{}, err
			}
			continue
		case frameAbort:
			most = maxControl
		case frameConfig:
			if config {
				most = maxConfig
			}
		case frameHashes:
			most = maxSpan * hashSize
		case frameStorage:
			most = maxStorage
		case frameState:
			most = maxState
		}
		b, err := s.conn.readPayload(h, most)
		s.whole.Add(1)
		if err == nil && h.typ == frameAbort {
			var r reason
			if err = decodeControl(h.typ, b, &r); err == nil {
				if err = errChecked; r.Reason != errChecked.Error() {
					err = toldError{fmt.Errorf("the source gave up: %s", clip(r.Reason))}
				}
			}
		}
		return reply{h, b}, err
	}
}

// machine is the machine under construction.
func (s *session) machine() Target {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	return s.target
}

// toldError marks an error that the source has told.
type toldError struct{ error }

func (e toldError) Unwrap() error { return e.error }

// refusedError is why the source is refused.
type refusedError struct {
	error
	reasons []string
}

// receive runs the migration. What became of it is the session's state, which finish
// reads, and not the error.
func (s *session) receive(ctx context.Context, r *Receiver, alive uint16) error {
	ok := helloOK{Version: Version, Channels: uint16(len(s.inlets)), Alive: aliveInterval(s.timeout), Features: r.known}
	if err := s.conn.writeControl(frameHelloOK, ok); err != nil {
		return err
	}
	s.pulse.beat(alive)
	target, err := s.build(r)
	if err != nil {
		return err
	}
	for {
		f, state, err := s.receiveState(ctx, target)
		loaded := false
		if err == nil && f.typ != frameUndo {
			f, loaded, err = s.offer(target, state)
		}
		s.storage.end()
		switch {
		case err != nil:
			return err
		case f.typ == frameUndo && f.length == 0 && f.first == s.stop && !s.shared:
			if err := s.undo(target, f, loaded); err != nil {
				return err
			}
		case f.typ == frameCommit && f.length == 0 && f.first == s.stop && loaded:
			began := time.Now()
			if err := s.commit(ctx); err != nil {
				return err
			}
			// If this does not arrive, the source sends a query.
			return s.conn.writeControl(frameRunning, took(began))
		default:
			return s.unexpected(f, "COMMIT")
		}
	}
}

// offer loads the state when the last page has landed and the storage has been compared,
// and says so to the source. It returns with what the source says next, which may be UNDO
// before that.
func (s *session) offer(target Target, state []byte) (f header, loaded bool, err error) {
	undo, err := s.awaitAll()
	if err != nil || undo.typ == frameUndo {
		return undo, false, err
	}
	if s.nWrong > 0 {
		return f, false, openly("%d pages differ from the source: %s", s.nWrong, strings.Join(s.wrong, ", "))
	}
	began := time.Now()
	if err := s.storage.whole(); err != nil {
		return f, false, err
	}
	if undo, err := s.loadState(target, state); err != nil || undo.typ == frameUndo {
		return undo, true, err
	}
	s.prepared()
	prepared := took(began)
	prepared.Storage = uint64(s.compared.Microseconds())
	b, err := strictcbor.Marshal(prepared)
	if err != nil {
		return f, true, err
	}
	if err := s.conn.writeFrame(header{typ: framePrepared, first: s.stop}, b); err != nil {
		return f, true, err
	}
	r, err := s.next()
	if err != nil {
		return f, true, &stepError{"prepared, but COMMIT did not come", err}
	}
	return r.header, true, nil
}

// awaitAll waits for the last page, and for the comparison of the storage, or for UNDO.
func (s *session) awaitAll() (undo header, err error) {
	s.idle.Store(true)
	defer s.idle.Store(false)
	landed, compared, since := s.landed(), s.storage.running(), time.Now()
	for landed != nil || compared != nil {
		select {
		case <-landed:
			landed, since = nil, time.Now()
		case err := <-compared:
			s.storage.begun, compared, s.compared = false, nil, time.Since(since)
			if err != nil {
				return undo, err
			}
		case r := <-s.undos:
			return r.header, nil
		case <-s.lost:
			return undo, s.awaitLanded()
		case <-s.over:
			return undo, s.awaitLanded()
		}
	}
	return undo, nil
}

// undo forgets the state of a stop that the source has undone: pages come again.
func (s *session) undo(target Target, f header, loaded bool) error {
	if err := s.unprepared(); err != nil {
		return err
	}
	if f.flags&flagLast != 0 {
		if err := s.awaitLanded(); err != nil {
			return err
		}
	}
	if in := s.later(); in != nil {
		if err := in.disarm(); err != nil {
			return &stepError{"take memory that was to come later as it is", err}
		}
	}
	if loaded {
		if err := target.UnloadState(s.ctx); err != nil {
			return &stepError{"forget the machine's state", err}
		}
	}
	s.wrong, s.nWrong = nil, 0
	if f.flags&flagLast != 0 {
		s.goOn()
	}
	return nil
}

// took is the payload of PREPARED or RUNNING, for a step that began then.
func took(began time.Time) tookMsg {
	return tookMsg{Microseconds: uint64(time.Since(began).Microseconds())}
}

// build receives the configuration and makes the machine.
func (s *session) build(r *Receiver) (Target, error) {
	f, err := s.next()
	if err != nil {
		return nil, err
	}
	if f.typ != frameConfig {
		return nil, s.unexpected(f.header, "CONFIG")
	}
	var config configMsg
	if err := decodeControl(f.typ, f.payload, &config); err != nil {
		return nil, err
	}
	f.payload = nil // it may be large, and has been copied
	var target Target
	if err = errors.Join(checkFeatures(config.Features, r.known), r.checkKeeps(config.Features)); err == nil {
		s.features, s.shared = config.Features, slices.Contains(config.Features, featureShared)
		if target, err = r.sharedBuild(s.shared)(s.ctx, config.Machine); err == nil {
			err = checkPreview(target, config.Preview)
		}
		if err == nil {
			err = s.prepareLater(r, target)
		}
	}
	if err != nil {
		return nil, &refusedError{fmt.Errorf("the machine cannot run here: %s", strings.Join(listOf(err), "; ")), reasonsOf(err)}
	}
	s.verdictMu.Lock()
	s.target = target
	s.verdictMu.Unlock()
	s.slots = target.Slots()
	msg, err := s.readyMsg(target)
	if err != nil {
		return nil, &refusedError{err, reasonsOf(err)}
	}
	if err := s.awaitChannels(); err != nil {
		return nil, err
	}
	if s.shared {
		close(s.last.landed)
	} else {
		s.ahead = newAhead(target, len(s.inlets))
	}
	// READY comes before a channel can end a round, which is confirmed by this
	// connection.
	s.says()
	if s.copies == nil {
		err = s.conn.writeFrame(header{typ: frameReady})
	} else {
		err = s.conn.writeControl(frameReady, msg)
	}
	close(s.ready)
	return target, err
}

// checkPreview frees the target if it cannot load what the source foresees.
func checkPreview(target Target, preview []byte) error {
	c, ok := target.(PreviewChecker)
	if !ok || len(preview) == 0 {
		return nil
	}
	if err := c.CheckPreview(preview); err != nil {
		return errors.Join(err, target.Discard())
	}
	return nil
}

// closedBySource gives the end of a connection a text that says what happened.
func closedBySource(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return openly("the source closed the connection")
	}
	return err
}

// next returns the next frame of the control connection.
func (s *session) next() (reply, error) {
	s.idle.Store(true)
	defer s.idle.Store(false)
	select {
	case f := <-s.frames:
		return f, nil
	case f := <-s.undos:
		return f, nil
	case <-s.ctx.Done():
		return reply{}, context.Cause(s.ctx)
	}
}

func (s *session) unexpected(h header, want string) error {
	return fmt.Errorf("%w: the source sent %v (%d bytes) instead of %s", ErrProtocol, h.typ, h.length, want)
}

// receiveState receives what comes by control while pages come by the data
// connections, and returns the state of a stop, or the UNDO of one that came before it.
func (s *session) receiveState(ctx context.Context, target Target) (f header, state []byte, err error) {
	s.storage = s.newComparison(ctx, target)
	for {
		f, err := s.next()
		if err != nil {
			return f.header, nil, err
		}
		switch {
		case f.typ == frameHashes:
			if err = s.awaitLanded(); err == nil {
				err = s.compareHashes(target, f)
			}
		case f.typ == frameStorage && s.storage.due():
			s.storage.begin(f.payload)
		case f.typ == frameUndo:
			s.stop = f.first
			return f.header, nil, nil
		case f.typ == frameState && !s.storage.due():
			if timed, ok := target.(Timed); ok {
				timed.SavedAfter(s.lastSaid())
			}
			if err := target.PrepareState(f.payload); err != nil {
				return f.header, nil, &stepError{"load the machine's state", err}
			}
			s.stop, s.flags = f.first, f.flags
			s.verdictMu.Lock()
			s.paused = f.flags&flagPaused != 0
			s.verdictMu.Unlock()
			return f.header, f.payload, nil
		default:
			err = s.unexpected(f.header, "STATE")
		}
		if err != nil {
			return f.header, nil, err
		}
	}
}

// echo confirms a round.
func (s *session) echo(round uint64) error {
	s.says()
	return s.conn.writeFrame(header{typ: frameRound, first: round})
}

// says notes that the source is about to be told what it waits for: READY, or the end of
// a round.
func (s *session) says() {
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	s.said = time.Now()
}

func (s *session) lastSaid() time.Time {
	s.dataMu.Lock()
	defer s.dataMu.Unlock()
	return s.said
}

// tellFailure tells the source why the migration ended, after the verdict is final.
func (s *session) tellFailure(err error) {
	s.cancel(err)
	s.conn.interrupt()
	s.reader.Wait()
	var refuses *refusedError
	switch {
	case errors.As(err, &refuses):
		s.conn.writeLast(frameRefused, refused{refuses.reasons}, endGrace)
	case !errors.As(err, new(toldError)):
		s.conn.writeLast(frameFailed, reason{clip(strings.Join(reasonsOf(err), "; "))}, endGrace)
	}
}

// close ends what is left of a session that is over.
func (s *session) close() {
	s.cancel(errOver)
	s.conn.Close()
	s.reader.Wait()
	s.pulse.end()
}
