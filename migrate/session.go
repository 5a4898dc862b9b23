package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// session is one migration at the destination. Its state only moves forward:
//
//	receiving -> prepared -> running
//	     \            \----> aborted
//	      \----------------> aborted
//
// The step out of prepared is made under verdictMu, before any vCPU enters the guest,
// and is never undone.
type session struct {
	id   sessionID
	conn *conn // control

	features []string // of the protocol, in use; set before a channel is served
	timeout  time.Duration
	life     *liveness
	slots    []Slot
	ahead    *ahead // nil: memory is not populated ahead
	wrong    []string
	nWrong   uint64

	dataMu  sync.Mutex // guards the six below
	inlets  []*inlet   // by number less one; nil: has not come yet
	missing int        // of inlets
	ended   bool       // no channel may join
	failure error      // of the first channel that failed
	arrived int        // channels whose ROUND has come
	round   roundWait

	all   chan struct{}  // closed when no channel is missing
	ready chan struct{}  // closed when the machine is built: pages may land
	over  chan struct{}  // closed when the session ends
	gone  chan struct{}  // closed when all of it has been freed, or its guest has arrived
	lanes sync.WaitGroup // channels that are served

	verdictMu sync.Mutex // guards state, target, paused
	state     sessionState
	target    Target
	paused    bool
	aborted   chan struct{} // closed when state is stateAborted for good
}

type sessionState uint8

const (
	stateReceiving sessionState = iota
	statePrepared
	stateRunning
	stateAborted
)

func newSession(id sessionID, c *conn, channels int, timeout time.Duration) *session {
	s := &session{id: id, conn: c, timeout: timeout, life: newLiveness(),
		inlets: make([]*inlet, channels), missing: channels,
		all: make(chan struct{}), ready: make(chan struct{}), over: make(chan struct{}), gone: make(chan struct{}), aborted: make(chan struct{})}
	c.life = s.life
	return s
}

// machine is the machine under construction.
func (s *session) machine() Target {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	return s.target
}

// toldError marks an error that the source has been told, or has told.
type toldError struct{ error }

func (e toldError) Unwrap() error { return e.error }

// receive runs the migration. What became of it is the session's state, which finish
// reads, and not the error.
func (s *session) receive(ctx context.Context, r *Receiver) error {
	if err := s.conn.writeControl(frameHelloOK, helloOK{Version: Version, Channels: uint16(len(s.inlets))}); err != nil {
		return err
	}
	target, err := s.build(ctx, r)
	if err != nil {
		return err
	}
	state, err := s.receiveState(target)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := target.LoadState(ctx, state); err != nil {
		return fmt.Errorf("load the machine's state: %w", err)
	}
	s.prepared()
	if err := s.conn.writeControl(framePrepared, took(began)); err != nil {
		return err
	}
	f, err := s.next()
	if err != nil {
		return fmt.Errorf("prepared, but COMMIT did not come: %w", err)
	}
	if f.typ != frameCommit || f.length != 0 {
		return s.unexpected(f, "COMMIT")
	}
	began = time.Now()
	if err := s.commit(ctx); err != nil {
		return err
	}
	// If this does not arrive, the source sends a query.
	return s.conn.writeControl(frameRunning, took(began))
}

// took is the payload of PREPARED or RUNNING, for a step that began then.
func took(began time.Time) tookMsg {
	return tookMsg{uint64(time.Since(began).Microseconds())}
}

// build receives the configuration and makes the machine.
func (s *session) build(ctx context.Context, r *Receiver) (Target, error) {
	f, err := s.next()
	if err != nil {
		return nil, err
	}
	if f.typ != frameConfig {
		return nil, s.unexpected(f, "CONFIG")
	}
	b, err := s.conn.readPayload(f, maxConfig)
	if err != nil {
		return nil, closedBySource(err)
	}
	var config configMsg
	if err := decodeControl(f.typ, b, &config); err != nil {
		return nil, err
	}
	var target Target
	if err = checkFeatures(config.Features, r.known); err == nil {
		s.features = config.Features
		target, err = r.builder.Build(ctx, config.Machine)
	}
	if err != nil {
		reasons := reasonsOf(err)
		if werr := s.conn.writeControl(frameRefused, refused{reasons}); werr != nil {
			return nil, errors.Join(err, werr)
		}
		return nil, toldError{fmt.Errorf("the machine cannot run here: %s", strings.Join(reasons, "; "))}
	}
	s.verdictMu.Lock()
	s.target = target
	s.verdictMu.Unlock()
	s.slots = target.Slots()
	if err := s.awaitChannels(ctx); err != nil {
		return nil, err
	}
	s.ahead = newAhead(target, len(s.inlets))
	// READY comes before a channel can end a round, which is confirmed by this
	// connection.
	err = s.conn.writeFrame(header{typ: frameReady})
	close(s.ready)
	return target, err
}

// closedBySource gives the end of a connection a text that says what happened.
func closedBySource(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return errors.New("the source closed the connection")
	}
	return err
}

// next reads a header; ABORT and the end of the connection are errors.
func (s *session) next() (header, error) {
	f, err := s.conn.readHeader()
	if err != nil {
		return f, closedBySource(err)
	}
	if f.typ == frameAbort {
		var r reason
		if err := s.conn.readControl(f, &r); err != nil {
			return f, closedBySource(err)
		}
		return f, toldError{fmt.Errorf("the source gave up: %s", clip(r.Reason))}
	}
	return f, nil
}

func (s *session) unexpected(f header, want string) error {
	return fmt.Errorf("%w: the source sent %v (%d bytes) instead of %s", ErrProtocol, f.typ, f.length, want)
}

// receiveState receives what comes by control while pages come by the data
// connections, and returns the state when the last page has landed.
func (s *session) receiveState(target Target) (state []byte, err error) {
	for {
		f, err := s.next()
		if err != nil {
			return nil, err
		}
		switch {
		case f.typ == frameHashes:
			if err = s.landed(); err == nil {
				err = s.compareHashes(target, f)
			}
		case f.typ == frameState:
			state, err := s.conn.readPayload(f, maxState)
			if err != nil {
				return nil, closedBySource(err)
			}
			if err := target.PrepareState(state); err != nil {
				return nil, fmt.Errorf("load the machine's state: %w", err)
			}
			if err := s.landed(); err != nil {
				return nil, s.reason(err)
			}
			if s.nWrong > 0 {
				return nil, fmt.Errorf("%d pages differ from the source: %s", s.nWrong, strings.Join(s.wrong, ", "))
			}
			s.verdictMu.Lock()
			s.paused = f.flags&flagPaused != 0
			s.verdictMu.Unlock()
			return state, nil
		default:
			return nil, s.unexpected(f, "STATE")
		}
		if err != nil {
			return nil, closedBySource(err)
		}
	}
}

// reason waits a moment for the source to say why a data connection was lost, which
// nobody read from the control connection meanwhile.
func (s *session) reason(err error) error {
	if isLoss(err) { // fail has set the end of this wait
		if _, said := s.next(); errors.As(said, new(toldError)) {
			return said
		}
	}
	return closedBySource(err)
}

// echo confirms a round. Nothing else is written to the control connection while
// pages come.
func (s *session) echo(round uint64) error {
	return s.conn.writeFrame(header{typ: frameRound, first: round})
}

// tellFailure tells the source why the migration ended, after the verdict is final.
func (s *session) tellFailure(err error) {
	if told := (toldError{}); !errors.As(err, &told) && !s.conn.midFrame {
		s.conn.writeTimeout = time.Second
		_ = s.conn.writeControl(frameFailed, reason{clip(err.Error())}) // it may be gone
	}
}
