package migrate

import (
	"context"
	"errors"
	"fmt"
)

func (s *session) prepared() {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	s.state = statePrepared
}

// commit takes the right to run. After an error it has not been taken and never will
// be.
func (s *session) commit(ctx context.Context) error {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	switch s.state {
	case stateRunning:
		return nil // a query came first
	case statePrepared:
	default:
		return errors.New("the right to run was given up before COMMIT came")
	}
	if ctx.Err() != nil { // the guest is better off at the source
		s.state = stateAborted
		return errEnding
	}
	if err := s.target.Start(ctx, s.paused); err != nil {
		s.state = stateAborted
		return fmt.Errorf("start the guest: %w", err)
	}
	s.state = stateRunning
	return nil
}

// queried answers a query. A source asks only after it has sent COMMIT, so for a
// session that is prepared the query stands for the COMMIT that has not arrived.
func (s *session) queried(ctx context.Context) string {
	if s.isState(statePrepared) {
		_ = s.commit(ctx) // the state has the result
		s.conn.Close()    // wake the reader that waits for COMMIT
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

// settle makes the verdict of a session that has ended final. Afterwards no channel
// writes to the control connection.
func (s *session) settle() (aborted bool) {
	s.verdictMu.Lock()
	if aborted = s.state != stateRunning; aborted {
		s.state = stateAborted
		close(s.aborted)
	}
	s.verdictMu.Unlock()
	s.stopChannels()
	s.lanes.Wait()
	return aborted
}

// finish ends the session, which is settled. It returns the machine that runs, or nil
// when the machine has been discarded. By then nothing writes to its memory.
func (s *session) finish() Target {
	s.closeChannels()
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	if s.state == stateRunning {
		return s.target
	}
	if s.target != nil {
		_ = s.target.Discard() // it never ran; its memory goes with the process at worst
		s.target = nil
	}
	return nil
}
