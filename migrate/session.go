package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
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
	conn *conn

	slots  []Slot
	hashes bool // the source sends HASHES
	wrong  []string
	nWrong uint64
	iov    [][]byte
	meta   spanMeta

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

// toldError marks an error of which the source has been told.
type toldError struct{ error }

func (e toldError) Unwrap() error { return e.error }

// receive takes the migration up to COMMIT. Whatever it returns, the session's
// state is the truth: finish reads it.
func (s *session) receive(ctx context.Context, r *Receiver, h hello) error {
	version, err := h.negotiate()
	if err != nil {
		return err
	}
	s.hashes = h.features&featureVerifyPages != 0
	if err := s.conn.writeControl(frameHelloOK, helloOK{version, h.features & knownFeatures}); err != nil {
		return err
	}
	target, err := s.build(ctx, r)
	if err != nil {
		return err
	}
	state, err := s.receivePages(target)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := target.LoadState(state); err != nil {
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
	if err := s.commit(); err != nil {
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
	config, err := s.conn.readPayload(f, maxConfig)
	if err != nil {
		return nil, lost(err)
	}
	target, err := r.builder.Build(ctx, config)
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
	return target, s.conn.writeFrame(header{typ: frameReady})
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

// receivePages puts pages into the target's memory until the state comes.
func (s *session) receivePages(target Target) (state []byte, err error) {
	for {
		f, err := s.next()
		if err != nil {
			return nil, err
		}
		switch f.typ {
		case framePages:
			err = s.applyPages(target, f)
		case frameHashes:
			err = s.compareHashes(target, f)
		case frameRound:
			if f.length != 0 {
				return nil, s.unexpected(f, "an empty ROUND")
			}
			err = s.conn.writeFrame(header{typ: frameRound, first: f.first})
		case frameState:
			if s.nWrong > 0 {
				return nil, fmt.Errorf("%d pages differ from the source: %s", s.nWrong, strings.Join(s.wrong, ", "))
			}
			s.verdictMu.Lock()
			s.paused = f.flags&flagPaused != 0
			s.verdictMu.Unlock()
			state, err := s.conn.readPayload(f, maxState)
			return state, lost(err)
		default:
			return nil, s.unexpected(f, "PAGES, ROUND or STATE")
		}
		if err != nil {
			return nil, lost(err)
		}
	}
}

// applyPages reads data pages straight into guest memory and makes zero pages
// read as zero.
func (s *session) applyPages(target Target, f header) error {
	if err := f.span(s.slots); err != nil {
		return err
	}
	if err := s.conn.readFull(s.meta.bytes(f.count)); err != nil {
		return err
	}
	if err := s.meta.decode(f); err != nil {
		return err
	}
	span := target.Bytes(int(f.slot), f.first, uint64(f.count))
	s.iov = s.iov[:0]
	words := spanWords(f.count)
	forRuns(s.meta.data[:words], func(start, end int) {
		s.iov = append(s.iov, span[start*PageSize:end*PageSize])
	})
	if len(s.iov) > 0 {
		if err := s.conn.readv(s.iov); err != nil {
			return err
		}
	}
	return s.applyZero(target, f, span)
}

// applyZero is R6 at the destination: whatever was there before, a ZERO page
// reads as zero afterwards. Looking first keeps memory that was never
// populated a hole, and huge pages whole.
func (s *session) applyZero(target Target, f header, span []byte) error {
	words := spanWords(f.count)
	zero := s.meta.zero[:words]
	any := uint64(0)
	for _, w := range zero {
		any |= w
	}
	if any == 0 {
		return nil
	}
	populated := s.meta.data[:words] // the data bits have been used
	if err := target.Populated(int(f.slot), f.first, uint64(f.count), populated); err != nil {
		return err
	}
	for w := range zero {
		zero[w] &= populated[w]
		for left := zero[w]; left != 0; left &= left - 1 {
			if isZero(span[(w*64+bits.TrailingZeros64(left))*PageSize:][:PageSize]) {
				zero[w] &^= left & -left
			}
		}
	}
	var err error
	forRuns(zero, func(start, end int) {
		if err == nil {
			err = target.Zero(int(f.slot), f.first+uint64(start), uint64(end-start))
		}
	})
	return err
}

// forRuns calls f for each run of set bits, [start, end).
func forRuns(words []uint64, f func(start, end int)) {
	start, end := 0, 0
	for w, word := range words {
		for left := word; left != 0; {
			lo := bits.TrailingZeros64(left)
			n := bits.TrailingZeros64(^(left >> lo))
			if at := w*64 + lo; at != end || start == end {
				if end > start {
					f(start, end)
				}
				start, end = at, at
			}
			end += n
			if lo+n >= 64 {
				break
			}
			left &^= (1<<n - 1) << lo
		}
	}
	if end > start {
		f(start, end)
	}
}

// compareHashes notes the pages that differ from the source.
func (s *session) compareHashes(target Target, f header) error {
	if err := f.span(s.slots); err != nil {
		return err
	}
	if !s.hashes || int(f.length) != int(f.count)*hashSize {
		return s.unexpected(f, "what was agreed on")
	}
	theirs, err := s.conn.readPayload(f, maxSpan*hashSize)
	if err != nil {
		return err
	}
	ours := make([]byte, len(theirs))
	if err := hashSpan(target, int(f.slot), f.first, uint64(f.count), ours); err != nil {
		return err
	}
	for i := 0; i < len(ours); i += hashSize {
		if bytes.Equal(ours[i:][:hashSize], theirs[i:][:hashSize]) || [hashSize]byte(theirs[i:]) == hashUnknown {
			continue
		}
		s.nWrong++
		if len(s.wrong) < 8 {
			page := f.first + uint64(i/hashSize)
			s.wrong = append(s.wrong, fmt.Sprintf("%#x", s.slots[f.slot].GPA+page*PageSize))
		}
	}
	return nil
}

func (s *session) prepared() {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	s.state = statePrepared
}

// commit takes the right to run. An error means that it was not taken and
// never will be.
func (s *session) commit() error {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	switch s.state {
	case stateRunning:
		return nil // a query came first
	case statePrepared:
	default:
		return errors.New("the right to run was given up before COMMIT came")
	}
	if err := s.target.Start(s.paused); err != nil {
		s.state = stateAborted
		return fmt.Errorf("start the guest: %w", err)
	}
	s.state = stateRunning
	return nil
}

// queried answers a query. A source asks only after COMMIT has left it, so for
// a session that is prepared the question is the COMMIT that did not arrive.
func (s *session) queried() string {
	if s.isState(statePrepared) {
		_ = s.commit() // the state says how it went
		s.conn.Close() // wake the reader that waits for COMMIT
	}
	switch {
	case s.isState(stateRunning):
		return verdictRunning
	case s.isState(stateAborted):
		return verdictAborted
	}
	return verdictUnknown
}

func (s *session) isState(want sessionState) bool {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	return s.state == want
}

// finish ends the session: the machine that runs, or nil after the abort has
// become final and the machine was discarded.
func (s *session) finish() Target {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	if s.state == stateRunning {
		return s.target
	}
	s.state = stateAborted
	if s.target != nil {
		_ = s.target.Discard() // it never ran; its memory goes with the process at worst
		s.target = nil
	}
	return nil
}

// tellFailure tells the source why, after the verdict is final.
func (s *session) tellFailure(err error) {
	if told := (toldError{}); !errors.As(err, &told) && !s.conn.midFrame {
		s.conn.writeTimeout = time.Second
		_ = s.conn.writeControl(frameFailed, reason{clip(err.Error())}) // it may be gone
	}
	drain(s.conn)
}
