package machine

import (
	"context"
	"errors"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/virtio"
)

// DeviceInfo describes one virtio device at one moment.
type DeviceInfo struct {
	Kind virtio.Kind
	Name string // as in messages: "disk a.img"
	Info virtio.Info
}

// Devices describes the virtio devices, in the order of their slots. It does not
// wait for the guest.
func (m *Machine) Devices() []DeviceInfo {
	out := make([]DeviceInfo, 0, len(m.spec.Devices))
	kinds := m.spec.kinds()
	for i, s := range m.spec.Devices {
		k, _ := kindOf(kinds, s.Kind())
		out = append(out, DeviceInfo{k, s.String(), m.devices.shown[i].Info()})
	}
	return out
}

// ErrNoBalloon: the machine has no memory balloon.
var ErrNoBalloon = errors.New("the VM has no balloon")

// statsTime is how long a guest has to answer with fresh statistics.
const statsTime = 500 * time.Millisecond

// Balloon describes the memory balloon, with statistics that the guest is asked
// for now. A guest that does not answer, or stands still, is described by those
// that it gave last.
func (m *Machine) Balloon(ctx context.Context) (balloon.Info, error) {
	b, ok := deviceOf[*balloon.Balloon](m)
	if !ok {
		return balloon.Info{}, kind.State("%w", ErrNoBalloon)
	}
	if m.gate.held() == 0 {
		ctx, cancel := context.WithTimeout(ctx, statsTime)
		defer cancel()
		_, _ = b.PollStats(ctx) // without an answer the last ones are shown
	}
	return b.Info(), nil
}

// SetBalloon sets how many bytes of the guest's memory the balloon is to hold. It
// fails with [ErrHandoff] while the machine is handed over: its state may have
// been saved.
func (m *Machine) SetBalloon(target uint64) error {
	b, ok := deviceOf[*balloon.Balloon](m)
	if !ok {
		return kind.State("%w", ErrNoBalloon)
	}
	return m.duringLife(func() error {
		if err := b.SetTarget(target); err != nil {
			return kind.Invalid("%w", err)
		}
		return nil
	})
}

// PressPowerButton asks the guest to shut down, and fails if the guest does not
// notice: it is paused, is being handed over, or does not listen to the button.
func (m *Machine) PressPowerButton() error {
	return m.duringLife(func() error {
		switch {
		case m.Paused():
			return kind.State("the guest is paused, and does not notice its power button before it is resumed")
		case !m.board.pm.ButtonEnabled():
			return kind.State("the guest does not listen to its power button: it has no ACPI, or has not started far enough")
		}
		m.board.pm.PressPowerButton()
		return nil
	})
}

// HasBalloon says whether the machine has a memory balloon.
func (m *Machine) HasBalloon() bool {
	_, ok := deviceOf[*balloon.Balloon](m)
	return ok
}
