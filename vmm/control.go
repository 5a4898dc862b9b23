package vmm

import (
	"context"
	"errors"
	"time"
)

// statsTime is how long a guest has to answer with fresh statistics.
const statsTime = 500 * time.Millisecond

var errNoBalloon = errors.New("the VM has no balloon (govmm run --balloon gives it one)")

// Balloon describes the memory balloon, with statistics that the guest is asked
// for now. A guest that does not answer, or stands still, is described by those
// that it gave last. It fails if there is no guest, or no balloon.
func (v *VM) Balloon(ctx context.Context) (info BalloonInfo, err error) {
	err = v.onMachine(func(m *Machine) error {
		if m.balloon == nil {
			return stateError("%w", errNoBalloon)
		}
		if m.gate.held() == 0 {
			ctx, cancel := context.WithTimeout(ctx, statsTime)
			defer cancel()
			_, _ = m.balloon.PollStats(ctx) // what there is is told
		}
		info = *m.balloonInfo()
		return nil
	})
	return info, err
}

// SetBalloon says how many bytes of the guest's memory the balloon shall hold:
// 0 gives all of it back. The guest follows in its own time, see [VM.Balloon],
// and when it runs again if it is paused. The wish outlives a reset and moves
// along. It is refused while the guest is being handed over; an amount that
// cannot be matches [ErrInvalid].
func (v *VM) SetBalloon(target uint64) error {
	return v.onMachine(func(m *Machine) error { return m.setBalloon(target) })
}

// setBalloon excludes a handoff, whose state may have been saved already.
func (m *Machine) setBalloon(target uint64) error {
	if m.balloon == nil {
		return stateError("%w", errNoBalloon)
	}
	m.quietMu.Lock()
	defer m.quietMu.Unlock()
	if err := m.gate.check(holdHandoff); err != nil {
		return m.explain(err)
	}
	if err := m.balloon.SetTarget(target); err != nil {
		return &kindError{ErrInvalid, err}
	}
	return nil
}

// PowerOff presses the guest's power button, which asks it to shut down, and
// returns at once: the VM ends when the guest has powered off, see [VM.Ended].
// It is refused when nobody hears the button: the guest is paused, or being
// handed over, or does not listen to it, see [Machine.PressPowerButton]. A
// receiver that waits for its guest ends, as by [VM.Stop]; a migration to it
// that is under way fails, and its guest goes on at the source.
func (v *VM) PowerOff() error {
	if waits, err := v.stopWaiting(); waits {
		return err
	}
	return v.onMachine(func(m *Machine) error {
		m.quietMu.Lock() // it is not being paused just now
		defer m.quietMu.Unlock()
		if err := m.gate.check(holdHandoff); err != nil {
			return m.explain(err)
		}
		switch {
		case m.Paused():
			return stateError("the guest is paused, and does not notice its power button before it is resumed")
		case !m.PressPowerButton():
			return stateError("the guest does not listen to its power button: it has no ACPI, or has not come so far")
		}
		return nil
	})
}

// stopWaiting ends a VM that has no guest, which no guest becomes meanwhile.
func (v *VM) stopWaiting() (waits bool, err error) {
	v.lifeMu.Lock()
	if v.machine != nil || v.life == lifeEnded {
		v.lifeMu.Unlock()
		return false, nil
	}
	if v.arriving {
		v.lifeMu.Unlock()
		return true, stateError("a guest is just arriving: ask again when it runs")
	}
	v.refusing = true
	v.lifeMu.Unlock()
	return true, v.Stop()
}

// arrive says that a guest is about to run here, and arrived that it does or
// cannot. It fails when the VM is to end.
func (v *VM) arrive() error {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	if v.refusing {
		return stateError("the VM is being stopped")
	}
	v.arriving = true
	return nil
}

func (v *VM) arrived() {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	v.arriving = false
}

// Ended is closed when the VM has ended and everything is freed; [VM.Info] then
// says whether the guest has moved away.
func (v *VM) Ended() <-chan struct{} { return v.ended }
