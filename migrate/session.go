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

// session is one migration at the destination. Its state moves forward only:
//
//	receiving -> prepared -> running
//	     \            \----> aborted
//	      \----------------> aborted
//
// The step out of prepared is taken under verdictMu, before any vCPU enters
// the guest, and is never taken back.
type session struct {
	id   sessionID
	conn *conn // control

	features []string // of the protocol, in use; set before a channel is served
	timeout  time.Duration
	life     *liveness
	slots    []Slot
	ahead    *ahead // nil: not done here
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
	lanes sync.WaitGroup // channels that are served

	verdictMu sync.Mutex // guards state, target, paused
	state     sessionState
	target    Target
	paused    bool
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
		all: make(chan struct{}), ready: make(chan struct{}), over: make(chan struct{})}
	c.life = s.life
	return s
}

// machine is the machine under construction.
func (s *session) machine() Target {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	return s.target
}

// toldError marks an error of which the source has been told.
type toldError struct{ error }

func (e toldError) Unwrap() error { return e.error }

// receive takes the migration up to COMMIT. Whatever it returns, the session's
// state is the truth: finish reads it.
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
	// If this does not arrive, the source asks.
	return s.conn.writeControl(frameRunning, took(began))
}

// took is what PREPARED and RUNNING say of a step.
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
		return nil, lost(err)
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
	// Before a channel can end a round, and say so by this connection.
	err = s.conn.writeFrame(header{typ: frameReady})
	close(s.ready)
	return target, err
}

// lost names the end of the connection.
func lost(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return errors.New("the source closed the connection")
	}
	return err
}

// next reads a header; ABORT and the end of the connection are errors.
func (s *session) next() (header, error) {
	f, err := s.conn.readHeader()
	if err != nil {
		return f, lost(err)
	}
	if f.typ == frameAbort {
		var r reason
		if err := s.conn.readControl(f, &r); err != nil {
			return f, lost(err)
		}
		return f, toldError{fmt.Errorf("the source gave up: %s", clip(r.Reason))}
	}
	return f, nil
}

func (s *session) unexpected(f header, want string) error {
	return fmt.Errorf("%w: the source sent %v (%d bytes) instead of %s", ErrProtocol, f.typ, f.length, want)
}

// receiveState takes what comes by control while pages come by the data
// connections, and returns the state after the last page has landed.
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
				return nil, lost(err)
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
			return nil, lost(err)
		}
	}
}

// reason waits a moment for what the source says of a data connection that was
// lost while nobody listened to the one of control.
func (s *session) reason(err error) error {
	if isLoss(err) { // fail has set the end of this wait
		if _, said := s.next(); errors.As(said, new(toldError)) {
			return said
		}
	}
	return lost(err)
}

// echo confirms a round. Nothing else is written while pages come.
func (s *session) echo(round uint64) error {
	return s.conn.writeFrame(header{typ: frameRound, first: round})
}

// tellFailure tells the source why, after the verdict is final.
func (s *session) tellFailure(err error) {
	if told := (toldError{}); !errors.As(err, &told) && !s.conn.midFrame {
		s.conn.writeTimeout = time.Second
		_ = s.conn.writeControl(frameFailed, reason{clip(err.Error())}) // it may be gone
	}
	drain(s.conn)
}
