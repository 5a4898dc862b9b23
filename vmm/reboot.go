package vmm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/govmm/govmm/vmm/machine"
)

const (
	// shortLife is how long a guest has to run for its reset to count as an ordinary one.
	shortLife = time.Second
	// freeResets is how many short lives in a row may follow each other at once.
	freeResets = 8
	// firstWait and longestWait bound how long the guest then stands still before it
	// starts: a loop of resets costs a few hundredths of a processor.
	firstWait   = 20 * time.Millisecond
	longestWait = time.Second
)

// resets paces a guest that resets itself again and again, and what is logged of it.
type resets struct {
	began  time.Time // when the guest started the last time
	streak int       // short lives in a row
}

// next is called at a reset of a guest that has lived for so long. It returns how long
// to wait before the guest starts, and whether to log this reset: of a streak the
// first three, and then those whose numbers are powers of two.
func (r *resets) next(lived time.Duration) (wait time.Duration, tell bool) {
	if lived >= shortLife {
		r.streak = 0
	}
	r.streak++
	if n := r.streak - freeResets; n > 0 {
		wait = min(firstWait<<min(n-1, 10), longestWait)
	}
	return wait, r.streak <= 3 || r.streak&(r.streak-1) == 0
}

// reboot replaces a machine that has ended by a reset by a new one, which runs when it
// returns. It is called by Run, or by the migration that Run waits for. After an error
// that ctx has not caused there is no machine any more.
func (v *VM) reboot(ctx context.Context, old *machine.Machine) (*machine.Machine, error) {
	wait, tell := v.resets.next(time.Since(v.resets.began))
	if tell {
		v.logReset(old, wait)
	}
	again := time.NewTimer(wait)
	defer again.Stop()
	select {
	case <-again.C:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	_ = old.Drain(ctx) // its last output before the new one's first, unless all is to end
	m, err := old.Reset()
	if err == nil {
		v.resets.began = time.Now()
		if err = m.Start(false); err != nil {
			err = errors.Join(fmt.Errorf("reset: %w", err), m.Close())
		}
	}
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	if v.lost = err; err == nil {
		v.machine = m
		v.events.addPaced(Event{Type: EventReset})
	}
	v.rebooting = false
	v.announce()
	return m, err
}

// awaitReset decides who resets a machine that has ended for it: a migration under way
// moves or resets the guest, and is waited for. again is set if Run is to reset it.
func (v *VM) awaitReset(ctx context.Context, m *machine.Machine) (again bool, err error) {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	for {
		o := v.outgoing
		switch {
		case v.lost != nil || v.machine != m:
			return false, v.lost
		case ctx.Err() != nil || o != nil && o.succeeded():
			return false, nil
		case o == nil || o.isSettled():
			v.rebooting = true
			return true, nil
		}
		changed := v.changed
		v.lifeMu.Unlock()
		select {
		case <-changed:
		case <-o.settled:
		case <-ctx.Done():
		}
		v.lifeMu.Lock()
	}
}

// logReset logs a reset that a user would want to know of.
func (v *VM) logReset(m *machine.Machine, wait time.Duration) {
	log := v.log.With("in_a_row", v.resets.streak)
	switch why := m.Exit().Err; {
	case why != nil:
		log.Warn("the guest resets", "why", why)
	case m.Panicked():
		log.Warn("the guest resets itself after its kernel had panicked: it starts again")
	}
	if wait > 0 {
		log.Warn("the guest resets again and again: each start is delayed", "by", wait)
	}
}
