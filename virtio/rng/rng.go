// Package rng is the virtio entropy device: virtio 1.2, section 5.4.
//
// Its one queue is filled from the host's getrandom(2). A guest gets a limited
// number of bytes a second. Requests beyond that wait in the guest's ring.
package rng

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/limit"
)

const (
	// DefaultRate is how much entropy a guest gets, in bytes a second.
	DefaultRate = 1 << 20
	// burst is how much a guest gets at once after it has asked for nothing, in
	// bytes.
	burst = 64 << 10
	// maxRequest is the most that one request gets, in bytes. The used length
	// tells the driver how much it got (5.4.6).
	maxRequest = 4096
	// minCost is the least that a request counts, in bytes, even if it is empty.
	minCost = 64

	queueSize = 64
)

// Config configures the device. The zero value is valid.
type Config struct {
	// Rate limits the entropy in bytes a second; 0 means [DefaultRate].
	Rate uint64
}

var _ virtio.Device = (*Device)(nil)

// Device is the entropy device. It implements [virtio.Device]. Only its queue
// travels with a migration.
type Device struct {
	fill  func([]byte) error
	limit *limit.Limiter
	loop  *virtio.Loop // nil when not active
}

// New makes the device.
func New(c Config) *Device {
	if c.Rate == 0 {
		c.Rate = DefaultRate
	}
	return &Device{fill: fill, limit: limit.Rates{BPS: c.Rate, BPSBurst: burst}.Limiter()}
}

// fill fills p from the kernel.
func fill(p []byte) error {
	for len(p) > 0 {
		n, err := unix.Getrandom(p, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("getrandom of %d bytes: %w", len(p), err)
		}
		p = p[n:]
	}
	return nil
}

// ID implements [virtio.Device].
func (d *Device) ID() uint16 { return virtio.IDEntropy }

// Features implements [virtio.Device]: the device type defines none (5.4.3).
func (d *Device) Features() uint64 { return 0 }

// QueueSizes implements [virtio.Device].
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// ReadConfig implements [virtio.Device]: there is no configuration (5.4.4).
func (d *Device) ReadConfig(uint32, []byte) {}

// WriteConfig implements [virtio.Device].
func (d *Device) WriteConfig(uint32, []byte) {}

// Activate implements [virtio.Device].
func (d *Device) Activate(_ uint64, queues []*virtio.Queue, n virtio.Notifier) error {
	if d.loop != nil || len(queues) != 1 {
		return fmt.Errorf("entropy device: activated with %d queues, or twice", len(queues))
	}
	d.loop = virtio.NewLoop(n)
	d.loop.Start(virtio.Task{Servers: []virtio.Server{{Queue: queues[0], Ready: d.limit.Ready, Serve: d.serve}}})
	return nil
}

// serve fills a request.
func (d *Device) serve(c *virtio.Chain) (uint32, error) {
	n := 0
	for _, s := range c.Writable {
		b := s.Buf[:min(len(s.Buf), maxRequest-n)]
		if err := d.fill(b); err != nil {
			return 0, err
		}
		if n += len(b); n == maxRequest {
			break
		}
	}
	d.limit.Spend(1, max(n, minCost))
	return uint32(n), nil
}

// Reset implements [virtio.Device].
func (d *Device) Reset() {
	d.loop.Stop()
	d.loop = nil
}

// ResetQueue implements [virtio.Device].
func (d *Device) ResetQueue(q *virtio.Queue) { d.loop.ResetQueue(q) }

// Pause implements [virtio.Device].
func (d *Device) Pause(ctx context.Context) error { return d.loop.Pause(ctx) }

// Resume implements [virtio.Device].
func (d *Device) Resume() error {
	d.loop.Resume()
	return nil
}

// SaveState implements [virtio.Device].
func (d *Device) SaveState() ([]byte, error) { return nil, nil }

// LoadState implements [virtio.Device].
func (d *Device) LoadState(b []byte) error {
	if len(b) > 0 {
		return fmt.Errorf("entropy device: expected no state, got %d bytes", len(b))
	}
	return nil
}
