// Package blk is the virtio block device: virtio 1.2, section 5.2.
//
// A disk is a raw file or a block device. Several workers serve each virtqueue by
// preadv and pwritev, directly from and to guest memory. Requests of a queue
// complete in any order.
//
//	d, err := blk.Open(blk.Config{Path: "root.img"}, slog.Default())
//	err = d.Lock()                   // no other process has the image
//	...                              // d behind a transport, the guest runs
//	d.Pause(ctx); d.Unlock()         // all writes are durable, the image is free
//	d.Close()
//
// The image's lock is the right to use it, and follows the right to run the
// guest in a migration: the source pauses the device and unlocks the image before
// the guest may run elsewhere; the destination opens the image at the beginning
// and locks it before the guest runs. See docs/blk.md.
package blk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	_ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/limit"
)

// Feature bits, section 5.2.3.
const (
	FeatureSegMax      uint64 = 1 << 2
	FeatureGeometry    uint64 = 1 << 4
	FeatureReadOnly    uint64 = 1 << 5
	FeatureBlockSize   uint64 = 1 << 6
	FeatureFlush       uint64 = 1 << 9
	FeatureTopology    uint64 = 1 << 10
	FeatureConfigWCE   uint64 = 1 << 11
	FeatureMultiQueue  uint64 = 1 << 12
	FeatureDiscard     uint64 = 1 << 13
	FeatureWriteZeroes uint64 = 1 << 14
)

const (
	// queueSize is the number of descriptors of each queue.
	queueSize = 256
	// maxSegments is how many buffers of data a request may have: a chain has at
	// most as many descriptors as its queue (2.7.5.3.1), two of them for the
	// header and the status.
	maxSegments = queueSize - 2
)

// Topology describes the storage to the guest (section 5.2.4). It must not
// change while a guest runs, so it travels in the [State].
type Topology struct {
	BlockSize    uint32 `cbor:"block_size"`    // bytes of a logical block
	PhysicalExp  uint8  `cbor:"physical_exp"`  // log2 of logical blocks in a physical one
	MinIO        uint16 `cbor:"min_io"`        // logical blocks: the smallest good transfer
	OptIO        uint32 `cbor:"opt_io"`        // logical blocks: the best transfer; 0: unknown
	DiscardAlign uint32 `cbor:"discard_align"` // sectors
}

var _ virtio.Device = (*Device)(nil)

// Device is a disk. It implements [virtio.Device].
type Device struct {
	config Config
	image  *image
	log    *slog.Logger
	limit  *limit.Limiter // nil: none

	features uint64       // negotiated; written by Activate only
	loop     *virtio.Loop // nil when not active

	// shownMu guards the parts of the configuration structure that can change.
	shownMu   sync.Mutex
	topology  Topology
	writeBack bool // the writeback field: writes are durable only after a flush

	flushes flushes

	// blockLog is set while the disk is copied to another host.
	blockLog atomic.Pointer[blockLog]

	counters counters
	written  written
}

// Open opens the disk's image, which is not locked yet. A file in a format such
// as qcow2 is refused with [ErrNotRaw]. Errors of the host's storage are logged;
// if log is nil, nothing is.
func Open(c Config, log *slog.Logger) (*Device, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("disk %s: %w", c.Path, err)
	}
	im, err := openImage(c)
	if err != nil {
		return nil, err
	}
	return newDevice(c, im, log), nil
}

// OpenCopy makes a new image of size bytes at c.Path, which reads as zeros, for a disk
// that is copied from another host. It has no name before [Device.Lock].
func OpenCopy(c Config, size uint64, log *slog.Logger) (*Device, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("disk %s: %w", c.Path, err)
	}
	im, err := openNew(c, size)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", c.Path, err)
	}
	c.Raw = true // what a guest has written says nothing about the format
	if err := im.inspect(c); err != nil {
		return nil, errors.Join(fmt.Errorf("disk %s: %w", c.Path, err), im.close())
	}
	return newDevice(c, im, log), nil
}

func newDevice(c Config, im *image, log *slog.Logger) *Device {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Device{config: c, image: im, log: log, limit: c.Limit.Limiter(), topology: im.topology, writeBack: true}
}

// Config is what the device was opened with.
func (d *Device) Config() Config { return d.config }

// Size is the disk's capacity in bytes. The image at the destination of a
// migration must have the same.
func (d *Device) Size() uint64 { return d.image.sectors * SectorSize }

// Lock takes the right to use the image, or fails with [ErrInUse]. It comes
// before Activate. Lock succeeds if the lock is held already.
//
// A disk that was copied here gets its file's name.
func (d *Device) Lock() error {
	if err := d.image.acquire(); err != nil {
		return err
	}
	err := d.image.publish()
	if err == nil && !d.config.ReadOnly {
		err = d.image.markMoved(false)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("disk %s: %w", d.config.Path, err), d.image.release())
	}
	return nil
}

// Unlock makes all writes durable and gives up the right to use the image. The
// device is paused or not active. After an error the image is still locked.
func (d *Device) Unlock() error {
	if err := d.Sync(); err != nil {
		return err
	}
	return d.release()
}

// release unlocks the image, and marks it as moved if it has been copied.
func (d *Device) release() error {
	if d.blockLog.Load() != nil && !d.config.ReadOnly {
		if err := d.image.markMoved(true); err != nil {
			d.log.Warn("the image is not marked as one whose guest has moved away: do not start the old copy", "device", "disk "+d.config.Path, "err", err)
		}
	}
	return d.image.release()
}

// Sync makes all completed writes durable. Requests may be under way. If it fails,
// writes that the guest takes for done may be lost, and Sync fails until the guest
// has been told, by its next flush.
func (d *Device) Sync() error {
	if err := d.flush(false); err != nil {
		return fmt.Errorf("disk %s: flush: %w", d.config.Path, err)
	}
	return nil
}

// ID implements [virtio.Device].
func (d *Device) ID() uint16 { return virtio.IDBlock }

// Features implements [virtio.Device]. They depend on the configuration only, not
// on the host's storage, because a guest keeps them when it moves.
func (d *Device) Features() uint64 {
	f := FeatureSegMax | FeatureGeometry | FeatureBlockSize | FeatureTopology
	if d.config.ReadOnly {
		f |= FeatureReadOnly
	} else {
		f |= FeatureFlush | FeatureConfigWCE | FeatureDiscard | FeatureWriteZeroes
	}
	if d.config.queues() > 1 {
		f |= FeatureMultiQueue
	}
	return f
}

// QueueSizes implements [virtio.Device].
func (d *Device) QueueSizes() []uint16 {
	sizes := make([]uint16, d.config.queues())
	for i := range sizes {
		sizes[i] = queueSize
	}
	return sizes
}

// Activate implements [virtio.Device].
func (d *Device) Activate(features uint64, queues []*virtio.Queue, n virtio.Notifier) error {
	if d.loop != nil {
		return fmt.Errorf("disk %s: activated twice", d.config.Path)
	}
	if len(queues) != d.config.queues() {
		return fmt.Errorf("disk %s: expected %d queues, got %d", d.config.Path, d.config.queues(), len(queues))
	}
	d.features, d.loop = features, virtio.NewLoop(n)
	perQueue := workersOf(len(queues))
	for _, q := range queues {
		for range perQueue {
			w := &worker{d: d, loop: d.loop}
			d.loop.Start(virtio.Task{Servers: []virtio.Server{w.server(q)}})
		}
	}
	return nil
}

// workersOf is how many requests of a queue are carried out at once.
func workersOf(queues int) int { return max(4, min(16, 64/queues)) }

// Reset implements [virtio.Device]. It waits for the requests under way.
func (d *Device) Reset() {
	d.loop.Stop()
	d.loop, d.features = nil, 0
	d.shownMu.Lock()
	d.writeBack = true
	d.shownMu.Unlock()
	d.flushes.forget()
}

// Pause implements [virtio.Device].
func (d *Device) Pause(ctx context.Context) error {
	if err := d.loop.Pause(ctx); err != nil {
		return fmt.Errorf("pause disk %s: %w", d.config.Path, err)
	}
	return nil
}

// Resume implements [virtio.Device].
func (d *Device) Resume() error {
	d.loop.Resume()
	return nil
}

// ResetQueue implements [virtio.Device]. A discard under way ends early.
func (d *Device) ResetQueue(q *virtio.Queue) { d.loop.ResetQueue(q) }

// Close makes all writes durable and closes the image, which gives up its lock.
func (d *Device) Close() error {
	return errors.Join(d.flush(false), d.image.close())
}

// hostError counts and logs an error of the host's storage.
func (d *Device) hostError(what string, sector uint64, n int64, err error) {
	d.counters.errors.Add(1)
	d.log.Error("storage error", "device", "disk "+d.config.Path, "request", what, "sector", sector, "bytes", n, "err", err)
}
