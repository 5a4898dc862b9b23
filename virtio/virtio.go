// Package virtio is the device side of virtio 1.2: virtqueues, split and
// packed, and the interface between a device type and its transport.
//
// A device type (package virtio/blk and its neighbours) implements [Device].
// The transport (package virtio/transport) negotiates features with the
// driver, sets up the [Queue]s, and calls Activate; from then on the device
// takes requests, which are descriptor chains, off its queues and gives them
// back. A [Loop] does that for a device, which supplies small functions:
//
//	func (d *Device) Activate(_ uint64, queues []*virtio.Queue, n virtio.Notifier) error {
//		d.loop = virtio.NewLoop(n)
//		d.loop.Start(virtio.Task{Servers: []virtio.Server{{Queue: queues[0], Serve: d.serve}}})
//		return nil
//	}
//	func (d *Device) Reset()                          { d.loop.Stop() }
//	func (d *Device) Pause(ctx context.Context) error { return d.loop.Pause(ctx) }
//	func (d *Device) Resume() error                   { d.loop.Resume(); return nil }
//	func (d *Device) ResetQueue(q *virtio.Queue)      { d.loop.ResetQueue(q) }
//
// The guest is not trusted: whatever it leaves in a ring, a queue returns
// chains that lie in guest RAM, or an error, and then nothing more until the
// driver resets it.
//
// Every write to guest memory, by a queue or by a device to a chain's buffers,
// is marked in the VMM's dirty bitmap after the write and before the guest is
// told of it. A live migration depends on this.
package virtio

import "context"

// Memory is guest memory as queues and devices see it; *memory.Memory
// implements it. Addresses are guest physical. A range that is not contiguous
// RAM is an error.
type Memory interface {
	// Slice returns guest memory itself. The caller marks what it writes there
	// (MarkDirty) after the write and before the guest is told of it.
	Slice(gpa, n uint64) ([]byte, error)
	// MarkDirty sets the VMM's dirty bits of the pages of a range.
	MarkDirty(gpa, n uint64) error
	ReadAt(p []byte, gpa uint64) error
	// WriteAt writes and marks.
	WriteAt(p []byte, gpa uint64) error
}

// Device is a device type, behind a transport. The transport calls ReadConfig
// from any vCPU's thread at any time, and the other methods one at a time.
//
// The transport calls Activate, then Pause and Resume any number of times, then
// Reset, and then Activate may come again. At the destination of a migration
// LoadState comes before Activate. What a device uses of the host belongs to its
// [Backend], which closes it.
type Device interface {
	// ID is the device type, section 5.
	ID() uint16
	// Features are the features of the device type that the device offers. The
	// transport adds others (see [RingFeatures]).
	Features() uint64
	// QueueSizes is the largest size of each queue: a power of 2, at most
	// [MaxQueueSize].
	QueueSizes() []uint16
	// ReadConfig fills p from the device's configuration structure at off. p
	// is zeroed before the call, and stays zero beyond the structure's end.
	ReadConfig(off uint32, p []byte)
	// WriteConfig takes what the driver writes to the configuration structure.
	// It ignores writes to fields that are read-only.
	WriteConfig(off uint32, p []byte)
	// Activate starts the device with the negotiated features, when the driver
	// has set DRIVER_OK. queues has one queue for each of QueueSizes; a queue
	// that the driver did not enable never has a chain. The device uses them,
	// and n, until Reset.
	Activate(features uint64, queues []*Queue, n Notifier) error
	// Reset stops the device and discards everything that the driver has set.
	// When it returns, no goroutine of the device touches guest memory or the
	// queues, and no chain is out. It is also called on a device that was never
	// active.
	Reset()
	// ResetQueue is called on an active device when the driver resets one queue
	// (section 2.6). The queue returns no more chains, and the transport waits
	// afterwards until none is out: the device gives back or drops
	// ([Queue.Drop]) those that it would otherwise keep.
	ResetQueue(q *Queue)
	// Pause returns when all requests that the device had taken are done or
	// back in their queue, and its goroutines are idle. The device does not
	// touch guest memory until Resume. Pause is called on an active device
	// only.
	Pause(ctx context.Context) error
	// Resume undoes Pause. The transport kicks each queue afterwards.
	Resume() error
	// SaveState returns the state of the device type, CBOR of a plain struct,
	// or nil. The device is paused or not active.
	SaveState() ([]byte, error)
	// LoadState takes what SaveState returned on another host. It is untrusted
	// input. LoadState does not touch guest memory.
	LoadState([]byte) error
}

// Notifier reaches the driver other than through a queue. Its methods may be
// called from any goroutine, but not from within a method of the device.
type Notifier interface {
	// ConfigChanged tells the driver that the configuration structure has
	// changed: it increments the generation and interrupts.
	ConfigChanged()
	// NeedsReset sets DEVICE_NEEDS_RESET (section 2.1.2) and logs err: the
	// driver has broken a rule, or the device cannot go on.
	NeedsReset(err error)
}

// Device types, section 5.
const (
	IDNet     uint16 = 1
	IDBlock   uint16 = 2
	IDConsole uint16 = 3
	IDEntropy uint16 = 4
	IDBalloon uint16 = 5
	IDVsock   uint16 = 19
)

// Feature bits that do not belong to a device type, section 6.
const (
	FeatureIndirectDesc uint64 = 1 << 28
	FeatureEventIdx     uint64 = 1 << 29
	FeatureVersion1     uint64 = 1 << 32
	FeatureRingPacked   uint64 = 1 << 34
	FeatureRingReset    uint64 = 1 << 40

	// RingFeatures are the features of queues. The transport adds
	// FeatureVersion1 and FeatureRingReset.
	RingFeatures = FeatureIndirectDesc | FeatureEventIdx | FeatureRingPacked
)

// Limits of queues and chains.
const (
	// MaxQueueSize is the largest size of a queue in descriptors (2.7, 2.8).
	MaxQueueSize = 32768
	// MaxChain is the largest number of descriptors in a chain, and so of
	// segments: as many as one preadv takes (IOV_MAX).
	MaxChain = 1024
)
