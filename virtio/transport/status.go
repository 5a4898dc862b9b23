package transport

import (
	"errors"
	"fmt"

	"github.com/govmm/govmm/virtio"
)

// Device status, section 2.1.
const (
	statusDriverOK   = 4
	statusFeaturesOK = 8
	statusNeedsReset = 64
	// statusDriver are those that the driver sets: ACKNOWLEDGE, DRIVER,
	// DRIVER_OK, FEATURES_OK, FAILED.
	statusDriver = 1 | 2 | statusDriverOK | statusFeaturesOK | 128
)

var errOrder = errors.New("the driver has set DRIVER_OK without FEATURES_OK")

// writeStatus is section 3.1. A driver adds bits; writing 0 resets.
func (t *Transport) writeStatus(v byte) {
	if v == 0 {
		t.reset()
		return
	}
	added := uint32(v) & statusDriver &^ t.status.Load()
	if added&statusFeaturesOK != 0 && !t.featuresFit() {
		added &^= statusFeaturesOK
	}
	t.status.Or(added)
	if added&statusDriverOK == 0 {
		return
	}
	if t.status.Load()&statusFeaturesOK == 0 {
		t.NeedsReset(errOrder)
		return
	}
	if err := t.activate(); err != nil {
		t.NeedsReset(err)
	}
}

// featuresFit reports whether the driver took only features that were offered,
// VIRTIO_F_VERSION_1 among them (2.2.2).
func (t *Transport) featuresFit() bool {
	return t.driverFeatures&^t.offered == 0 && t.driverFeatures&virtio.FeatureVersion1 != 0
}

// activate starts the queues that the driver enabled, and the device.
func (t *Transport) activate() error {
	for i, q := range t.queues {
		if q.regs.Enabled {
			if err := t.start(i); err != nil {
				return err
			}
		}
	}
	if err := t.dev.Activate(t.driverFeatures, t.deviceQueues(), t); err != nil {
		return err
	}
	t.active = true
	return nil
}

// start starts a queue with the values of its registers.
func (t *Transport) start(i int) error {
	q := t.queues[i]
	if err := q.Start(q.regs, t.driverFeatures); err != nil {
		return fmt.Errorf("queue %d: %w", i, err)
	}
	q.started = true
	t.wantNotifications(q, true)
	return nil
}

// enable handles the driver's write of 1 to queue_enable. Before DRIVER_OK it
// only sets the register; afterwards it starts a queue that was reset.
func (t *Transport) enable(q *queue) {
	if q.regs.Enabled || t.status.Load()&statusFeaturesOK == 0 {
		return
	}
	q.regs.Enabled = true
	if !t.active {
		return
	}
	if err := t.start(int(t.queueSelect)); err != nil {
		t.NeedsReset(err)
		return
	}
	q.Signal()
}

// resetQueue is section 2.6.1. The driver waits for its end.
func (t *Transport) resetQueue(i int) {
	q := t.queues[i]
	if t.driverFeatures&virtio.FeatureRingReset == 0 || !q.regs.Enabled || !t.active {
		return
	}
	t.wantNotifications(q, false)
	if q.started {
		q.Quiesce()
		t.dev.ResetQueue(q.Queue)
		q.Drain()
	}
	t.forget(q)
}

// forget puts a queue into its initial state.
func (t *Transport) forget(q *queue) {
	q.Stop()
	q.started = false
	q.regs = virtio.QueueState{Size: q.MaxSize()}
	q.vector.Store(noVector)
}

// reset puts everything into its initial state. When it returns, the device does
// not touch guest memory.
func (t *Transport) reset() {
	for _, q := range t.queues {
		t.wantNotifications(q, false)
	}
	t.dev.Reset()
	for _, q := range t.queues {
		t.forget(q)
	}
	t.active, t.loaded = false, false
	t.deviceSelect, t.driverSelect, t.driverFeatures, t.queueSelect = 0, 0, 0, 0
	t.configVector.Store(noVector)
	t.isr.Store(0)
	t.status.Store(0)
	if t.msix != nil {
		t.msix.ClearPending()
	}
}

// NeedsReset implements virtio.Notifier.
func (t *Transport) NeedsReset(err error) {
	before := t.status.Or(statusNeedsReset)
	if before&statusNeedsReset != 0 {
		return
	}
	t.host.Log.Warn("the device needs a reset", "type", t.dev.ID(), "err", err)
	if before&statusDriverOK != 0 {
		t.configInterrupt()
	}
}

// ConfigChanged implements virtio.Notifier.
func (t *Transport) ConfigChanged() {
	t.generation.Add(1)
	if t.status.Load()&statusDriverOK != 0 {
		t.configInterrupt()
	}
}
