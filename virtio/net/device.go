package net

import (
	"context"
	"fmt"

	"github.com/govmm/govmm/virtio"
)

var _ virtio.Device = (*Device)(nil)

// ID is the device type.
func (d *Device) ID() uint16 { return virtio.IDNet }

// Features are those of this device and of its backend.
func (d *Device) Features() uint64 {
	f := FeatureMAC | FeatureStatus | FeatureMergeableRxBuffers | FeatureCtrlVQ | FeatureCtrlMACAddr | FeatureGuestAnnounce
	f |= d.cfg.Backend.Offloads() & (hostOffloads | guestOffloads)
	if f&guestOffloads != 0 {
		f |= FeatureCtrlGuestOffloads
	}
	if d.cfg.MTU != 0 {
		f |= FeatureMTU
	}
	if len(d.ports) > 1 {
		f |= FeatureMultiQueue
	}
	return f
}

// QueueSizes is the sizes of a receive and a transmit queue for each pair, and of
// the control queue (section 5.1.2).
func (d *Device) QueueSizes() []uint16 {
	var sizes []uint16
	for range 2 * len(d.ports) {
		sizes = append(sizes, queueSize)
	}
	return append(sizes, controlSize)
}

// Activate starts serving the queues. Without VIRTIO_NET_F_MQ there is one pair,
// and the control queue follows it.
func (d *Device) Activate(features uint64, queues []*virtio.Queue, n virtio.Notifier) error {
	d.config.Lock()
	d.features, d.notifier = features, n
	s := d.state
	d.config.Unlock()

	pairs := 1
	if features&FeatureMultiQueue != 0 {
		pairs = len(d.ports)
	}
	if int(s.Pairs) > pairs {
		return fmt.Errorf("net %s: %d queue pairs in use, expected at most %d", d.cfg.Backend.Name(), s.Pairs, pairs)
	}
	d.loop = virtio.NewLoop(n)
	for i := range pairs {
		r := newReceiver(d, i, queues[2*i], features)
		d.receivers = append(d.receivers, r)
		d.loop.Start(r.task())
		d.start(newSender(d, i, features).server(queues[2*i+1]))
	}
	guest := features & guestOffloads
	if s.OffloadsSet {
		guest &= s.Offloads
	}
	// The errors have been logged. A backend that fails sets the link down; the
	// guest goes on.
	if !d.setOffloads(guest) || !d.setPairs(int(s.Pairs)) {
		d.config.Lock()
		s := d.state
		s.Status &^= statusLinkUp
		d.setState(s)
		d.config.Unlock()
	}
	d.config.Lock()
	arrived := d.arrived
	d.arrived = false
	d.config.Unlock()
	if arrived {
		n.ConfigChanged() // the link may differ from that of the other host
	}
	if features&FeatureCtrlVQ != 0 {
		d.start(virtio.Server{Queue: queues[2*pairs], Serve: (&controller{d: d, features: features}).serve})
	}
	return nil
}

// start starts a server in a task of its own.
func (d *Device) start(s virtio.Server) { d.loop.Start(virtio.Task{Servers: []virtio.Server{s}}) }

// Reset stops serving and discards what the driver set.
func (d *Device) Reset() {
	d.endAnnouncement()
	d.loop.Stop()
	d.loop, d.receivers = nil, nil
	d.config.Lock()
	defer d.config.Unlock()
	d.features, d.notifier, d.arrived = 0, nil, false
	d.setState(d.fresh())
}

// Pause returns when no frame is being moved. If ctx ends first, the device goes
// on.
func (d *Device) Pause(ctx context.Context) error {
	d.endAnnouncement()
	if err := d.loop.Pause(ctx); err != nil {
		return fmt.Errorf("net %s: %w", d.cfg.Backend.Name(), err)
	}
	return nil
}

// Resume undoes Pause.
func (d *Device) Resume() error {
	d.loop.Resume()
	return nil
}

// ResetQueue implements [virtio.Device].
func (d *Device) ResetQueue(q *virtio.Queue) { d.loop.ResetQueue(q) }

// Close closes the backend.
func (d *Device) Close() error {
	if err := d.cfg.Backend.Close(); err != nil {
		return fmt.Errorf("net: %w", err)
	}
	return nil
}
