package vmm

import (
	"context"
	"errors"
	"fmt"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/machine"
)

// outgoing is a migration from here, and the goroutine that drives it.
type outgoing struct {
	*migrate.Migration
	addr    string
	guest   *migrant
	hints   migrate.HintMode
	keeps   *migrate.Snapshot // nil: the guest moves
	cancel  context.CancelCauseFunc
	upgrade *Upgrade        // nil: it goes to another VM
	record  MigrationRecord // without its end
	settled chan struct{}   // closed after err was set and the VM knows
	err     error           // of Migration.Run
}

// Migrate moves the guest to the receiver at address and returns when it runs
// there, or why it does not: then it goes on here, unless the error matches
// migrate.ErrHandoffUnknown. address is HOST:PORT, unix:PATH, or what opt.Dial
// understands.
// After a migration the VM ends.
//
// When ctx ends the migration is cancelled. It is too late for that once the right
// to run has been handed over: Migrate then returns an error that matches
// migrate.ErrHandoffUnknown, and the VM goes on asking the destination.
func (v *VM) Migrate(ctx context.Context, address string, opt migrate.Options) (migrate.Result, error) {
	o, err := v.startMigration(address, opt)
	if err != nil {
		return migrate.Result{}, err
	}
	select {
	case <-o.settled:
	case <-ctx.Done():
		if o.Cancel() != nil {
			return o.Result(), fmt.Errorf("%w: the guest has been handed over to %s: %w", migrate.ErrHandoffUnknown, address, context.Cause(ctx))
		}
		<-o.settled
	}
	return o.Result(), o.err
}

// StartMigration is [VM.Migrate] without the waiting: the migration tells how it
// goes. It is refused while another is under way.
func (v *VM) StartMigration(address string, opt migrate.Options) (*migrate.Migration, error) {
	o, err := v.startMigration(address, opt)
	if err != nil {
		return nil, err
	}
	return o.Migration, nil
}

func (v *VM) startMigration(address string, opt migrate.Options) (*outgoing, error) {
	return v.beginMigration(address, opt, nil)
}

// beginMigration is startMigration, or the beginning of an upgrade.
func (v *VM) beginMigration(address string, opt migrate.Options, u *Upgrade) (*outgoing, error) {
	if err := checkMigration(address, opt); err != nil {
		return nil, err
	}
	key := migrationKey(address, opt)
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	if o, err := v.known(key, opt); o != nil || err != nil {
		return o, err
	}
	for v.rebooting && v.life == lifeRunning { // for a second at most
		changed := v.changed
		v.lifeMu.Unlock()
		<-changed
		v.lifeMu.Lock()
	}
	if err := v.migratable(); err != nil {
		return nil, err
	}
	if opt.ID == "" {
		opt.ID = newMigrationID()
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	opt.Notify = v.notified(address, opt)
	guest := &migrant{Source: v.machine.Source(), vm: v, machine: v.machine}
	if u != nil {
		opt.SharedMemory = v.machine.SharesMemory()
	}
	o := &outgoing{Migration: migrate.New(u.sends(guest), address, opt), addr: address, hints: opt.Hints, keeps: opt.Snapshot,
		guest: guest, cancel: cancel, upgrade: u, settled: make(chan struct{})}
	v.remember(o, key, opt)
	v.outgoing = o
	v.noteStateLocked()
	go v.drive(ctx, o)
	return o, nil
}

// checkMigration reports what makes no sense before anything is done.
func checkMigration(address string, opt migrate.Options) error {
	if err := migrate.CheckAddress(address); err != nil && opt.Dial == nil {
		return kind.Invalid("%w", err)
	}
	if err := opt.Validate(); err != nil {
		return kind.Invalid("%w", err)
	}
	return validID(opt.ID)
}

// migratable reports why the guest's writes cannot be logged now, for a migration or
// a measurement. lifeMu is held.
func (v *VM) migratable() error {
	switch {
	case v.life == lifeMigrated:
		return kind.State("the guest has moved away")
	case v.life == lifeEnded || v.lost != nil:
		return kind.State("the VM has stopped")
	case v.machine == nil:
		return kind.State("no guest has arrived yet")
	case v.life == lifeNew:
		return kind.State("the VM does not run yet")
	case v.measuring != nil:
		return errMeasuring
	case v.outgoing != nil && !v.outgoing.isSettled():
		return kind.State("a migration to %s is under way", v.outgoing.addr)
	case v.outgoing != nil && v.outgoing.succeeded(): // Run is just about to say so
		return kind.State("the guest has moved away")
	}
	if v.isStopping() {
		return kind.State("the VM is being stopped")
	}
	if n := v.machine.MissingPages(); n > 0 {
		return kind.State("%d pages of the guest's memory have not come yet from where it was: wait until they have", n)
	}
	if isClosed(v.machine.Done()) && v.machine.Exit().Kind != machine.ExitReset { // a reset does not keep a guest here
		return kind.State("the guest has ended")
	}
	return nil
}

// migrant is the guest as a migration sends it: the machine that it has now. The
// migration orders its calls so that none is under way during Reset.
type migrant struct {
	*machine.Source
	vm      *VM
	machine *machine.Machine
}

var (
	_ migrate.Resetter  = (*migrant)(nil)
	_ migrate.Hinting   = (*migrant)(nil)
	_ migrate.Throttler = (*migrant)(nil)
	_ migrate.BulkLog   = (*migrant)(nil)
	_ migrate.Previewer = (*migrant)(nil)
)

// Reset implements [migrate.Resetter].
func (g *migrant) Reset(ctx context.Context) error {
	m, err := g.vm.reboot(ctx, g.machine)
	if err == nil {
		g.machine, g.Source = m, m.Source()
	}
	return err
}

// drive runs a migration to its end. The VM waits for it: see endMigration and
// cancelMigration.
func (v *VM) drive(ctx context.Context, o *outgoing) {
	defer o.cancel(nil)
	_, o.err = o.Migration.Run(ctx)
	v.logHints(o)
	if o.err == nil && o.upgrade != nil {
		o.upgrade.Left() // before anything else takes its time
	}
	v.conclude(o)
	switch {
	case o.err == nil && o.goesOn():
	case o.err == nil:
		close(v.left)
	case v.isStopping(): // then the outcome says it
	case o.upgrade != nil:
		v.log.Warn("the guest goes on in this process: the upgrade failed", "err", o.err)
	default:
		v.log.Warn("migration failed", "to", o.addr, "err", o.err)
	}
	close(o.settled)
	v.noteState()
}

// logHints logs why the guest was not asked for its free pages, if it has a balloon or
// the user asked for hints.
func (v *VM) logHints(o *outgoing) {
	why := o.Migration.Result().HintsOff
	if why != "" && (o.hints == migrate.HintsOn || o.hints != migrate.HintsOff && o.guest.machine.HasBalloon()) {
		v.log.Warn("free-page hints are not used, or no longer", "to", o.addr, "reason", why)
	}
}

func (v *VM) isStopping() bool { return isClosed(v.stopping) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
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

func (o *outgoing) isSettled() bool { return isClosed(o.settled) }

// succeeded says whether the guest has moved away, or was kept and is to end.
func (o *outgoing) succeeded() bool { return o.isSettled() && o.err == nil && !o.goesOn() }

// goesOn says that the guest is kept and goes on here.
func (o *outgoing) goesOn() bool { return o.keeps != nil && !o.keeps.Stop }

// unknown says whether the migration ended without a verdict.
func (o *outgoing) unknown() bool {
	return o.isSettled() && errors.Is(o.err, migrate.ErrHandoffUnknown)
}

// handedOver says whether the destination may have the right to run the guest.
func (o *outgoing) handedOver() bool {
	if o.isSettled() {
		return o.succeeded()
	}
	return o.Committed() && o.keeps == nil
}

// takeBack lets the guest go on here although the destination may run it.
func (o *outgoing) takeBack() error {
	if o.Serving() {
		return kind.State("the guest runs at %s, and lacks memory that is here: this process sends it", o.addr)
	}
	o.Abandon()
	<-o.settled
	switch {
	case o.err == nil:
		return kind.State("the guest runs at %s", o.addr)
	case errors.Is(o.err, migrate.ErrServing):
		return kind.State("the guest runs at %s, and lacks memory that was here", o.addr)
	case errors.Is(o.err, migrate.ErrHandoffUnknown):
		return o.guest.machine.TakeBack()
	}
	return nil // the verdict came in time: the guest does not run there
}

// endMigration ends a migration, or measurement, under way because the guest has
// ended, and waits for it. The guest was not handed over: one that is handed over
// stands still and does not end.
func (v *VM) endMigration(cause error) {
	v.endMeasurement(cause)
	if o := v.lastMigration(); o != nil {
		o.cancel(cause)
		<-o.settled
	}
}

// cancelMigration ends a migration under way because the VM is to end, and waits for
// it. If it is too late to cancel, it waits for the destination's answer as long as
// the connection lives, and does not ask again.
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
