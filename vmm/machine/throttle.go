package machine

import (
	"fmt"
	"time"

	"github.com/govmm/govmm/migrate"
)

// A guest is slowed down by keeping all of its vCPUs out of KVM_RUN for a share of
// the time: they run for a slice, are kicked, and rest at the gate. There they
// count as standing still, so a throttled machine pauses at once. Timers of the
// guest that expire meanwhile are late, as on a busy host.

// throttleSlice is how long the vCPUs run between two rests: long enough that kicks
// cost little, short enough that a guest at half speed runs smoothly.
const throttleSlice = 5 * time.Millisecond

// throttle is what keeps the vCPUs out of the guest, again and again.
type throttle struct {
	stop chan struct{} // closed to end it
	done chan struct{} // closed when it has ended and no vCPU rests for it
}

var _ migrate.Throttler = (*source)(nil)

// Throttle keeps the vCPUs from running for percent of the time, 0 to 99; 0 ends
// that. When it returns, the throttle before it has ended.
func (m *Machine) Throttle(percent int) error {
	if percent < 0 || percent > 99 {
		return fmt.Errorf("throttle the vCPUs by %d%%: must be between 0 and 99", percent)
	}
	m.gate.throttle(throttleSlice, throttleSlice*time.Duration(percent)/time.Duration(100-percent))
	return nil
}

// throttle lets the vCPUs run for work and rest for rest, in turn; rest 0 ends
// it.
func (g *gate) throttle(work, rest time.Duration) {
	g.throttleMu.Lock()
	defer g.throttleMu.Unlock()
	if t := g.throttling; t != nil {
		close(t.stop)
		<-t.done
		g.throttling = nil
	}
	if rest == 0 {
		return
	}
	t := &throttle{stop: make(chan struct{}), done: make(chan struct{})}
	g.throttling = t
	go t.loop(g, work, rest)
}

func (t *throttle) loop(g *gate, work, rest time.Duration) {
	defer close(t.done)
	timer := time.NewTimer(work)
	defer timer.Stop()
	for {
		select {
		case <-t.stop:
			return
		case <-timer.C:
		}
		g.rest()
		timer.Reset(rest)
		select {
		case <-t.stop:
			g.unrest()
			return
		case <-timer.C:
		}
		g.unrest()
		timer.Reset(work)
	}
}
