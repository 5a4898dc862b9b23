package vmm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/govmm/govmm/internal/boundedlog"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/vmm/machine"
)

// OutcomeKind says how a VM ended.
type OutcomeKind uint8

// How a VM ends.
const (
	Stopped    OutcomeKind = iota // by Stop, or by the end of Run's context
	PoweredOff                    // by the guest
	Crashed                       // the guest, or KVM, could not go on
	Migrated                      // the guest runs elsewhere
	Saved                         // the guest was saved, and ended here
)

// String returns the kind in words.
func (k OutcomeKind) String() string {
	switch k {
	case Stopped:
		return "stopped"
	case PoweredOff:
		return "powered off"
	case Crashed:
		return "crashed"
	case Migrated:
		return "migrated"
	case Saved:
		return "saved"
	}
	return fmt.Sprintf("outcome %d", uint8(k))
}

// Outcome is the end of a VM.
type Outcome struct {
	Kind OutcomeKind
	// Text says it in one line.
	Text string
}

// lastWords bounds how long the end of a VM waits for the other ends of its lines to
// take what the guest has sent, and for the log to take its records.
const lastWords = time.Second

// Run lets the guest run and returns when the VM has ended and everything is
// freed: the guest powered off or crashed, it has moved away, [VM.Stop] was
// called or ctx ended. A guest that resets itself is started again in place. A
// VM made by [NewReceiver] waits for its guest first. The error is about this
// process, not about the guest. Run is called once.
func (v *VM) Run(ctx context.Context) (out Outcome, err error) {
	v.lifeMu.Lock()
	if v.life != lifeNew {
		v.lifeMu.Unlock()
		return Outcome{}, kind.State("the VM was run, or stopped, before")
	}
	v.life = lifeRunning
	m := v.machine
	if m == nil {
		v.noteStateLocked() // it receives
	}
	v.lifeMu.Unlock()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-v.stopping:
			cancel()
		case <-ctx.Done():
			v.stopOnce.Do(func() { close(v.stopping) })
		}
	}()
	defer func() {
		end := lifeEnded
		if out.Kind == Migrated {
			end = lifeMigrated
		}
		err = errors.Join(err, v.free(end))
		close(v.ended)
		ctx, cancel := context.WithTimeout(context.Background(), lastWords)
		defer cancel()
		boundedlog.Flush(ctx, v.log)
	}()

	if v.receiver != nil {
		stop, err := v.receive(ctx)
		defer stop()
		if err != nil {
			return Outcome{}, err
		}
	} else if err := m.Start(false); err != nil { // somebody may have paused it already
		return Outcome{}, err
	}
	if v.started != nil {
		v.started()
		v.started = nil
	}
	v.noteState()
	v.resets.began = time.Now()
	for {
		out, again, err := v.watch(ctx)
		if err != nil || !again {
			return out, err
		}
		if _, err := v.reboot(ctx, v.current()); err != nil && ctx.Err() == nil {
			return Outcome{}, err
		}
	}
}

// stepMigration is what is waited for when a migration is cancelled.
const stepMigration = "the migration under way"

// watch waits until the machine has ended, has moved away or is to be stopped.
// When it returns no vCPU runs and no migration is under way. again is set for
// a reset.
func (v *VM) watch(ctx context.Context) (out Outcome, again bool, err error) {
	m := v.current()
	if m == nil { // stopped before anything arrived
		return Outcome{Kind: Stopped, Text: "stopped; no guest has arrived"}, false, nil
	}
	select {
	case <-m.Done():
		ended := &machine.EndedError{Exit: m.Exit()}
		if ended.Exit.Kind != machine.ExitReset {
			v.endMigration(ended)
			break
		}
		v.endMeasurement(ended)
		again, err := v.awaitReset(ctx, m)
		switch {
		case again || err != nil:
			return Outcome{}, again, err
		case ctx.Err() != nil:
			v.during(stepMigration, v.cancelMigration)
		case v.current() != m: // a migration has reset the guest here
			return v.watch(ctx)
		}
	case <-v.left:
		<-v.lastMigration().settled
	case <-ctx.Done():
		v.during(stepMigration, v.cancelMigration)
	}
	if o := v.lastMigration(); o != nil && o.succeeded() {
		m.Stop()
		if o.keeps != nil {
			return Outcome{Kind: Saved, Text: "the guest was saved; govmm run --from goes on with it"}, false, nil
		}
		return Outcome{Kind: Migrated, Text: "the guest runs at " + o.addr + " now"}, false, nil
	}
	if ctx.Err() != nil {
		m.Stop()
		return v.stopped(), false, nil
	}
	panicked := ""
	if m.Panicked() {
		panicked = " after its kernel had panicked"
	}
	switch exit := m.Exit(); exit.Kind {
	case machine.ExitPowerOff:
		return Outcome{Kind: PoweredOff, Text: "the guest powered off" + panicked}, false, nil
	case machine.ExitCrash:
		return Outcome{Kind: Crashed, Text: exit.Err.Error() + panicked}, false, nil
	default:
		return v.stopped(), false, nil
	}
}

// stopped is the outcome of Stop, which says so if a handoff was left open.
func (v *VM) stopped() Outcome {
	if o := v.lastMigration(); o != nil && o.unknown() {
		return Outcome{Kind: Stopped, Text: "stopped; it is not known whether the guest runs at " + o.addr}
	}
	return Outcome{Kind: Stopped, Text: "stopped"}
}

func (v *VM) current() *machine.Machine {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	return v.machine
}

func (v *VM) setMachine(m *machine.Machine) {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	v.machine = m
	v.announce()
}

// announce wakes those who wait for a change. lifeMu is held.
func (v *VM) announce() {
	close(v.changed)
	v.changed = make(chan struct{})
	v.noteStateLocked()
}

// free gives everything back, except what Info needs.
func (v *VM) free(end life) error {
	v.lifeMu.Lock()
	m := v.machine
	v.life = end
	v.announce()
	v.lifeMu.Unlock()
	v.events.end()
	var errs []error
	if m != nil {
		ctx, cancel := context.WithTimeout(context.Background(), lastWords)
		defer cancel()
		m.Kill()
		if err := m.Drain(ctx); err != nil {
			v.log.Warn("output of the guest is left behind", "err", err)
		}
	}
	for _, l := range v.lines { // before the machine, which waits for a write that is stuck
		v.during("the other end of the guest's "+l.name, func() { errs = append(errs, l.Close()) })
	}
	if m != nil {
		_ = m.Disconnect() // Close has its error
	}
	if end == lifeMigrated {
		close(v.moved)
	}
	if m != nil {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}
