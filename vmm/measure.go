package vmm

import (
	"context"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/machine"
)

// measurement uses a machine's dirty log without a migration.
type measurement struct {
	cancel context.CancelCauseFunc
	done   chan struct{} // closed when it has let go of the machine
}

// errMeasuring is why a migration, or a second measurement, has to wait.
var errMeasuring = kind.State("the guest's writes are being measured: ask again in a moment")

// MeasureDirtyRate watches for an interval what the guest writes. It is refused
// while a migration, or another measurement, is under way, and a migration is
// refused meanwhile.
func (v *VM) MeasureDirtyRate(ctx context.Context, interval time.Duration) (rate migrate.DirtyRate, err error) {
	if interval < migrate.MinRateInterval || interval > migrate.MaxRateInterval {
		return rate, invalidInterval(interval)
	}
	err = v.measure(ctx, func(ctx context.Context, src migrate.Source) error {
		rate, err = migrate.MeasureDirtyRate(ctx, src, src, interval)
		return err
	})
	return rate, err
}

// EstimateMigration predicts what a migration to addr would take; see
// [migrate.EstimateMigration]. It is refused as MeasureDirtyRate is.
func (v *VM) EstimateMigration(ctx context.Context, addr string, opt migrate.Options, interval time.Duration) (e migrate.Estimate, err error) {
	if interval < migrate.MinRateInterval || interval > migrate.MaxRateInterval {
		return e, invalidInterval(interval)
	}
	if err := checkMigration(addr, opt); err != nil {
		return e, err
	}
	err = v.measure(ctx, func(ctx context.Context, src migrate.Source) error {
		e, err = migrate.EstimateMigration(ctx, src, addr, opt, interval)
		return err
	})
	return e, err
}

// CheckMigration asks the destination at addr whether it would take the guest, and moves
// nothing; see [migrate.Check]. It is refused as MeasureDirtyRate is.
func (v *VM) CheckMigration(ctx context.Context, addr string, opt migrate.Options) (r migrate.CheckResult, err error) {
	if err := checkMigration(addr, opt); err != nil {
		return r, err
	}
	err = v.measure(ctx, func(ctx context.Context, src migrate.Source) error {
		r = migrate.Check(ctx, src, addr, opt)
		return nil
	})
	return r, err
}

func invalidInterval(d time.Duration) error {
	return kind.Invalid("interval %v: must be between %v and %v", d, migrate.MinRateInterval, migrate.MaxRateInterval)
}

// errStopping is why a measurement of a VM that is stopped has no result.
var errStopping = kind.State("the VM is being stopped")

// measure runs f on the machine, which is not freed before f has returned.
func (v *VM) measure(ctx context.Context, f func(context.Context, migrate.Source) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	me := &measurement{cancel: cancel, done: make(chan struct{})}
	m, err := v.beginMeasurement(me)
	if err != nil {
		return err
	}
	defer func() {
		v.lifeMu.Lock()
		v.measuring = nil
		v.lifeMu.Unlock()
		close(me.done)
	}()
	return f(ctx, m.Source())
}

func (v *VM) beginMeasurement(me *measurement) (*machine.Machine, error) {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	if err := v.migratable(); err != nil {
		return nil, err
	}
	if isClosed(v.machine.Done()) {
		return nil, kind.State("the guest is being reset: ask again in a moment")
	}
	v.measuring = me
	return v.machine, nil
}

// endMeasurement ends a measurement under way and waits until it has let go of
// the machine.
func (v *VM) endMeasurement(cause error) {
	v.lifeMu.Lock()
	me := v.measuring
	v.lifeMu.Unlock()
	if me != nil {
		me.cancel(cause)
		<-me.done
	}
}
