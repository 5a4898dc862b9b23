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
// The guest is not trusted: whatever it leaves in a ring, a queue answers with
// chains whose every byte is guest RAM, or with an error, after which the
// queue stands still until the driver resets it.
//
// All that is written to guest memory, by a queue or by a device in a chain's
// buffers, is marked in the VMM's dirty bitmap after the bytes have landed and
// before the guest can learn of them; a live migration depends on it.
package virtio

import "context"

// Memory is guest memory as queues and devices see it; *memory.Memory is one.
// Ranges are guest physical; one that is not contiguous RAM is an error.
type Memory interface {
	// Slice returns guest memory itself. Who lets anything write to it calls
	// MarkDirty after the bytes have landed, before the guest can learn of
	// them.
	Slice(gpa, n uint64) ([]byte, error)
	// MarkDirty sets the VMM's dirty bits of the pages of a range.
	MarkDirty(gpa, n uint64) error
	ReadAt(p []byte, gpa uint64) error
	// WriteAt writes and marks.
	WriteAt(p []byte, gpa uint64) error
}

// Device is what a device type has of its own, behind a transport. The
// transport calls ReadConfig from any vCPU's thread at any time; the other
// methods one at a time.
//
// A device's life is Activate, any number of Pause and Resume, Reset, and
// again. What it holds of the host is its [Backend]'s to give back. On a migration's destination LoadState comes first,
// on a device that is not active, and Activate then goes on from there.
type Device interface {
	// ID is the device type, section 5.
	ID() uint16
	// Features are those that this device offers. The transport adds those of
	// the rings and of itself (see [RingFeatures]).
	Features() uint64
	// QueueSizes is the largest size of each queue: a power of 2, at most
	// [MaxQueueSize].
	QueueSizes() []uint16
	// ReadConfig fills p from the device's configuration structure at off;
	// beyond the structure's end it reads as zero. p comes zeroed.
	ReadConfig(off uint32, p []byte)
	// WriteConfig writes the driver's bytes. What is not writable is ignored.
	WriteConfig(off uint32, p []byte)
	// Activate starts the device with the negotiated features: the driver has
	// set DRIVER_OK. queues has one for each of QueueSizes; one that the
	// driver did not enable never has a chain. The device keeps them, and n,
	// until Reset.
	Activate(features uint64, queues []*Queue, n Notifier) error
	// Reset stops the device and forgets everything of this driver. When it
	// returns no goroutine of the device touches guest memory or the queues,
	// and none of its chains is out. It is also called on a device that was
	// never active.
	Reset()
	// ResetQueue is called on an active device when the driver resets one queue
	// (section 2.6). The queue hands out nothing more, and the transport then
	// waits until none of its chains is out: the device gives back soon, or
	// drops ([Queue.Drop]), what it would otherwise hold on to.
	ResetQueue(q *Queue)
	// Pause returns when the device is quiet: requests that it had taken are
	// done, its goroutines are idle, and it will not touch guest memory
	// until Resume. It is called on an active device only.
	Pause(ctx context.Context) error
	// Resume undoes Pause. The transport kicks each queue afterwards.
	Resume() error
	// SaveState returns the device type's own state, CBOR of a plain struct;
	// nil if there is none. The device is paused or not active.
	SaveState() ([]byte, error)
	// LoadState takes what SaveState returned on another host: it is checked
	// like anything from a stranger. It does not touch guest memory.
	LoadState([]byte) error
}

// Notifier is how a device reaches its driver other than through a queue.
// Methods may be called from any goroutine, not from within a method of
// the device.
type Notifier interface {
	// ConfigChanged says that the device's configuration structure has changed:
	// it counts the generation on and interrupts.
	ConfigChanged()
	// NeedsReset sets DEVICE_NEEDS_RESET (section 2.1.2) because of err, which
	// is logged: the driver has broken a rule, or the device cannot go on.
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

	// RingFeatures are those that queues know; the transport adds
	// FeatureVersion1 and FeatureRingReset.
	RingFeatures = FeatureIndirectDesc | FeatureEventIdx | FeatureRingPacked
)

// Limits of queues and chains.
const (
	// MaxQueueSize is the largest queue there can be, in descriptors (2.7, 2.8).
	MaxQueueSize = 32768
	// MaxChain is the largest number of descriptors in a chain that a queue
	// takes, and so of segments: what one preadv takes (IOV_MAX).
	MaxChain = 1024
)
