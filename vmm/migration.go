package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/govmm/govmm/migrate"
)

// outgoing is a migration from here, and the goroutine that drives it.
type outgoing struct {
	*migrate.Migration
	addr    string
	machine *Machine
	hints   migrate.HintMode
	cancel  context.CancelCauseFunc
	settled chan struct{} // closed after err was set and the VM knows
	err     error         // of Migration.Run
}

// StartMigration begins to move the guest to the receiver at addr (host:port)
// and returns at once: the migration tells how it goes. It is refused while
// another is under way. When it completes, the VM ends; when not, the guest
// goes on here.
func (v *VM) StartMigration(addr string, opt migrate.Options) (*migrate.Migration, error) {
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return nil, &kindError{ErrInvalid, fmt.Errorf("migrate to %q: an address is HOST:PORT", addr)}
	}
	if err := opt.Validate(); err != nil {
		return nil, &kindError{ErrInvalid, err}
	}
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	if err := v.migratable(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	o := &outgoing{Migration: migrate.New(v.machine.Source(), addr, opt), addr: addr, hints: opt.Hints,
		machine: v.machine, cancel: cancel, settled: make(chan struct{})}
	v.outgoing = o
	go v.drive(ctx, o)
	return o.Migration, nil
}

// migratable says why the guest's writes cannot be logged now, for a migration
// or a measurement. lifeMu is held.
func (v *VM) migratable() error {
	switch {
	case v.life == lifeMigrated:
		return stateError("the guest has moved away")
	case v.life == lifeEnded:
		return stateError("the VM has stopped")
	case v.machine == nil:
		return stateError("no guest has arrived yet")
	case v.measuring != nil:
		return errMeasuring
	case v.outgoing != nil && !v.outgoing.isSettled():
		return stateError("a migration to %s is under way", v.outgoing.addr)
	case v.outgoing != nil && v.outgoing.succeeded(): // Run is just about to say so
		return stateError("the guest has moved away")
	}
	if v.isStopping() {
		return stateError("the VM is being stopped")
	}
	select {
	case <-v.machine.Done():
		return stateError("the guest has ended")
	default:
	}
	return nil
}

// drive runs a migration to its end. The VM waits for it: see endMigration and
// cancelMigration.
func (v *VM) drive(ctx context.Context, o *outgoing) {
	defer o.cancel(nil)
	_, o.err = o.Migration.Run(ctx)
	v.logHints(o)
	if o.err == nil {
		close(v.left)
	} else if !v.isStopping() { // then the outcome says it
		v.logf("migration to %s: %v", o.addr, o.err)
	}
	close(o.settled)
}

// logHints says why the guest was not asked for its free pages: one that has a
// balloon, or that was to be asked.
func (v *VM) logHints(o *outgoing) {
	why := o.Migration.Result().HintsOff
	if why != "" && (o.hints == migrate.HintsOn || o.hints != migrate.HintsOff && o.machine.Balloon() != nil) {
		v.logf("migration to %s: free-page hints are not used, or not any more: %s", o.addr, why)
	}
}

func (v *VM) isStopping() bool {
	select {
	case <-v.stopping:
		return true
	default:
		return false
	}
}

// Migration returns the migration from here that is under way or was the last,
// nil if there was none.
func (v *VM) Migration() *migrate.Migration {
	if o := v.lastMigration(); o != nil {
		return o.Migration
	}
	return nil
}

func (v *VM) lastMigration() *outgoing {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	return v.outgoing
}

func (o *outgoing) isSettled() bool {
	select {
	case <-o.settled:
		return true
	default:
		return false
	}
}

// succeeded says whether the guest has moved away.
func (o *outgoing) succeeded() bool { return o.isSettled() && o.err == nil }

// unknown says whether the migration was given up without a verdict.
func (o *outgoing) unknown() bool {
	return o.isSettled() && errors.Is(o.err, migrate.ErrHandoffUnknown)
}

// handedOver says whether the destination may have the right to run the guest.
func (o *outgoing) handedOver() bool {
	if o.isSettled() {
		return o.err == nil
	}
	return o.Committed()
}

// takeBack lets the guest go on here although the destination may run it.
func (o *outgoing) takeBack() error {
	o.Abandon()
	<-o.settled
	switch {
	case o.err == nil:
		return stateError("the guest runs at %s", o.addr)
	case errors.Is(o.err, migrate.ErrHandoffUnknown):
		// The migration left it stopped, and its writes logged.
		if err := o.machine.StopDirtyLog(); err != nil {
			return err
		}
		return o.machine.Source().ResumeAfterAbort(context.Background())
	}
	return nil // the verdict came after all: it does not run there
}

// endMigration ends a migration, or measurement, under way because the guest has ended, and
// waits for it. It has not handed the guest over: a guest that is handed over
// stands still.
func (v *VM) endMigration(cause error) {
	v.endMeasurement(cause)
	if o := v.lastMigration(); o != nil {
		o.cancel(cause)
		<-o.settled
	}
}

// cancelMigration ends a migration under way because the VM is to end, and
// waits for it. If it is too late to cancel, the destination's word is waited
// for as long as the connection lives; nobody is asked again.
func (v *VM) cancelMigration() {
	v.endMeasurement(errStopping)
	o := v.lastMigration()
	if o == nil {
		return
	}
	if o.Cancel() != nil {
		o.Abandon()
	}
	<-o.settled
}
