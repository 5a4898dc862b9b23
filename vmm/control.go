package vmm

import (
	"context"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/vmm/machine"
)

// Balloon describes the memory balloon, with statistics that the guest is asked
// for now. A guest that does not answer, or stands still, is described by those
// that it gave last. It fails if there is no guest, or no balloon.
func (v *VM) Balloon(ctx context.Context) (info balloon.Info, err error) {
	err = v.onMachine(ctx, func(m *machine.Machine) error {
		info, err = m.Balloon(ctx)
		return err
	})
	return info, err
}

// SetBalloon sets how many bytes of the guest's memory the balloon is to hold: 0
// gives all of it back. The guest follows in its own time, see [VM.Balloon], and
// when it runs again if it is paused. The target outlives a reset and moves along.
// SetBalloon is refused while the guest is being handed over; an amount that is not
// possible matches [ErrInvalid].
func (v *VM) SetBalloon(ctx context.Context, target uint64) error {
	return v.onMachine(ctx, func(m *machine.Machine) error { return m.SetBalloon(target) })
}

// PowerOff presses the guest's power button, which asks it to shut down, and
// returns at once: the VM ends when the guest has powered off, see [VM.Ended].
// It is refused when the guest does not notice the button: the guest is paused, or
// being handed over, or does not listen to it. A receiver that waits for its guest
// ends, as by [VM.Stop]; a migration to it that is under way fails, and its guest
// goes on at the source.
func (v *VM) PowerOff(ctx context.Context) error {
	if waits, err := v.stopWaiting(ctx); waits {
		return err
	}
	return v.onMachine(ctx, func(m *machine.Machine) error { return m.PressPowerButton() })
}

// stopWaiting ends a VM that has no guest, and keeps a guest from arriving
// meanwhile.
func (v *VM) stopWaiting(ctx context.Context) (waits bool, err error) {
	v.lifeMu.Lock()
	if v.machine != nil || v.life == lifeEnded {
		v.lifeMu.Unlock()
		return false, nil
	}
	if v.arriving {
		v.lifeMu.Unlock()
		return true, kind.State("a guest is arriving: ask again when it runs")
	}
	v.refusing = true
	v.lifeMu.Unlock()
	return true, v.Stop(ctx)
}

// arrive is called when a guest is about to run here, and arrived when it runs or
// cannot. arrive fails when the VM is to end.
func (v *VM) arrive() error {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	if v.refusing {
		return kind.Told(kind.State("the VM is being stopped"))
	}
	v.arriving = true
	return nil
}

func (v *VM) arrived() {
	v.lifeMu.Lock()
	defer v.lifeMu.Unlock()
	v.arriving = false
}

// Moved is closed when the guest has moved away and its disks, taps and sockets are
// free here. What is still to be freed then is memory, which takes time.
func (v *VM) Moved() <-chan struct{} { return v.moved }

// Ended is closed when the VM has ended and everything is freed; [VM.Info] then
// says whether the guest has moved away.
func (v *VM) Ended() <-chan struct{} { return v.ended }
