package migrate

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// Resetter is a [Source] whose guest may reset itself. What its memory has means nothing
// from then on: a guest that waits for its reset is moved as it is, without a page, and
// starts anew where it has the right to run. So a guest that resets itself again and
// again is moved as well, whatever it writes in between.
type Resetter interface {
	// ResetRequested is closed when the guest has asked for a reset. It then stands still,
	// PauseForHandoff and SaveState succeed, and from what the latter returns the
	// destination starts the guest anew.
	ResetRequested() <-chan struct{}
	// Reset resets the guest here and lets it run. It is called while the dirty log is
	// off, and no other method of the source at the same time.
	Reset(ctx context.Context) error
}

const (
	// resetPatience is how long a guest may wait for its reset until COMMIT: then it is
	// reset here and the migration begins anew.
	resetPatience = 10 * time.Second
	// maxRestarts bounds how often a migration begins anew.
	maxRestarts = 10
)

// errAnew is why a destination ends a session whose source has begun another.
var errAnew = openly("the source begins anew")

// errResetHere ends a session whose guest has to be reset at the source.
var errResetHere = errors.New("the guest resets itself, and is reset at the source first")

// resets is what a migration knows of its guest's resets.
type resets struct {
	resetMu sync.Mutex // guards precopy, and is held over each use of the source until that is set
	precopy *precopy   // the dirty log is on: a reset here would need a new session
	known   bool       // the destination can start a guest anew; does not change after setup
}

// attempts runs sessions until one ends otherwise than by a reset of the guest here.
func (m *Migration) attempts(pre, base context.Context) error {
	r, ok := m.src.(Resetter)
	if !ok {
		return m.run(pre, base)
	}
	for n := 0; ; n++ {
		err := m.attempt(pre, base, r)
		if !errors.Is(err, errResetHere) {
			return err
		}
		if n == maxRestarts {
			return fmt.Errorf("the migration has begun anew %d times: %w", n, err)
		}
		if isClosed(r.ResetRequested()) { // otherwise watchResets has just done it
			if err := m.resetHere(pre, r); err != nil {
				return err
			}
		}
		m.meter.again()
	}
}

// attempt runs one session, and watches for resets meanwhile.
func (m *Migration) attempt(pre, base context.Context, r Resetter) error {
	ctx, cancel := context.WithCancelCause(pre)
	m.resets = resets{}
	m.previous = m.session
	var watcher sync.WaitGroup
	watcher.Go(func() { m.watchResets(ctx, cancel, r) })
	defer watcher.Wait()
	defer cancel(nil)
	return m.run(ctx, base)
}

// watchResets does what the guest's requests for a reset need. Before the dirty log is on
// the guest is reset at once. Later nothing more is sent of its memory, and it waits for
// the destination.
func (m *Migration) watchResets(ctx context.Context, cancel context.CancelCauseFunc, r Resetter) {
	for {
		select {
		case <-r.ResetRequested():
		case <-ctx.Done():
			return
		}
		m.resets.resetMu.Lock()
		p := m.resets.precopy
		if p == nil && ctx.Err() != nil {
			m.resets.resetMu.Unlock()
			return
		}
		if p == nil {
			err := m.resetHere(ctx, r)
			m.resets.resetMu.Unlock()
			if err != nil {
				cancel(err)
				return
			}
			continue
		}
		m.resets.resetMu.Unlock()
		if m.resets.known {
			p.drop()
			select {
			case <-m.clock.after(resetPatience):
			case <-ctx.Done():
				return
			}
		}
		m.handoffMu.Lock()
		defer m.handoffMu.Unlock()
		if !m.committed {
			cancel(errResetHere)
		}
		return
	}
}

func (m *Migration) resetHere(ctx context.Context, r Resetter) error {
	if err := r.Reset(ctx); err != nil {
		return fmt.Errorf("reset the guest: %w", err)
	}
	m.meter.update(func(mt *meter) { mt.result.GuestResets++ })
	return nil
}

// resetting reports whether the guest waits for its reset, so that nothing of its memory
// is to be sent. It fails if the destination cannot start it anew.
func (p *precopy) resetting() (bool, error) {
	r, ok := p.m.src.(Resetter)
	if !ok || !isClosed(r.ResetRequested()) {
		return false, nil
	}
	if !p.m.resets.known {
		return false, errResetHere
	}
	p.drop()
	return true, nil
}

// drop forgets what is to be sent, and ends all waiting for the guest.
func (p *precopy) drop() {
	p.dropOnce.Do(func() {
		p.tracker.Forget()
		p.hints.HintLost()
		p.m.meter.update(func(m *meter) {
			m.result.GuestResets++
			m.progress.RemainingBytes = 0
		})
		close(p.dropped)
	})
}
