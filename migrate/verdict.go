package migrate

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// verdicts are those on sessions that are over. Only a session that was prepared has one:
// nobody asks about another, since no COMMIT was sent. The verdict that a guest runs is
// the last one, after which nothing is forgotten.
type verdicts struct {
	kept  map[sessionID]keptVerdict
	order []sessionID // oldest first
}

type keptVerdict struct {
	from identity // who may ask
	ran  bool
}

// keptVerdicts is how many verdicts are remembered.
const keptVerdicts = 1 << 14

func (v *verdicts) keep(id sessionID, from identity, ran bool) {
	v.kept[id] = keptVerdict{from, ran}
	v.order = append(v.order, id)
	if len(v.order) > keptVerdicts {
		delete(v.kept, v.order[0])
		v.order = v.order[1:]
	}
}

func (v *verdicts) knows(id sessionID) bool {
	_, known := v.kept[id]
	return known
}

// of returns the verdict on a session, for the peer that had it.
func (v *verdicts) of(id sessionID, from identity) (string, error) {
	switch k, known := v.kept[id]; {
	case !known:
		return verdictUnknown, nil
	case k.from != from:
		return "", errOtherPeer
	case k.ran:
		return verdictRunning, nil
	}
	return verdictAborted, nil
}

func (s *session) prepared() {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	s.state = statePrepared
	s.wasPrepared = true
}

// unprepared takes prepared back.
func (s *session) unprepared() error {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	if s.state != stateReceiving && s.state != statePrepared {
		return fmt.Errorf("%w: the source undid its stop after it had given up the right to run", ErrProtocol)
	}
	s.state = stateReceiving
	return nil
}

// commit takes the right to run. After an error it has not been taken and never will
// be.
func (s *session) commit(ctx context.Context) error {
	if s.claim() {
		return s.start(ctx)
	}
	if s.isState(stateStarting) { // a query came first
		<-s.decided
	}
	if !s.isState(stateRunning) {
		return openly("the right to run was given up before COMMIT came")
	}
	return nil
}

// claim makes the one who gets true start the guest.
func (s *session) claim() bool {
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	if s.state != statePrepared {
		return false
	}
	s.state = stateStarting
	return true
}

// start starts the guest, or gives up the right to run.
func (s *session) start(ctx context.Context) (err error) {
	if ctx.Err() != nil { // the guest is better off at the source
		err = errEnding
	} else if err = s.target.Start(ctx, s.paused); err != nil {
		step := "start the guest"
		if slices.Contains(s.features, featureSnapshot) {
			step = "keep the guest"
		}
		err = &stepError{step, err}
	}
	s.verdictMu.Lock()
	defer s.verdictMu.Unlock()
	s.state = stateRunning
	if err != nil {
		s.state = stateAborted
	}
	close(s.decided)
	return err
}

// queried answers a query. A source asks only after it has sent COMMIT, so for a
// session that is prepared the query stands for the COMMIT that has not arrived.
func (s *session) queried(ctx context.Context) string {
	if s.claim() {
		_ = s.start(ctx) // the state has the result
		s.conn.Close()   // wake the reader that waits for COMMIT
	}
	if s.isState(stateStarting) {
		t := time.NewTimer(s.timeout / 2) // the source must hear from us
		defer t.Stop()
		select {
		case <-s.decided:
		case <-t.C:
			return verdictPending
		case <-ctx.Done():
			return verdictPending
		}
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
	if s.state == stateReceiving || s.state == statePrepared {
		s.state = stateAborted
		close(s.decided)
	}
	s.verdictMu.Unlock()
	<-s.decided
	if aborted = !s.isState(stateRunning); aborted {
		close(s.aborted)
	}
	s.stopChannels()
	s.lanes.Wait()
	return aborted
}

// finish ends the session, which is settled. It returns the machine that runs, or nil
// when the machine has been discarded. By then nothing writes to its memory.
func (s *session) finish() Target {
	s.closeChannels()
	s.verdictMu.Lock()
	target, runs := s.target, s.state == stateRunning
	s.target = nil
	s.verdictMu.Unlock()
	if runs {
		return target
	}
	s.later().end()
	if target != nil {
		_ = target.Discard() // it never ran; its memory goes with the process at worst
	}
	return nil
}
