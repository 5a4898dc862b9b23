// Package transport puts a virtio device on the PCI bus: virtio 1.2, section
// 4.1, the modern interface only.
//
// A [Transport] is between a driver, which reaches it through registers in a
// BAR, and a virtio.Device. It negotiates features, keeps the status, sets up
// queues, and carries notifications: the driver's by ioeventfd, the device's by
// MSI-X. It answers a driver's errors as the specification says: by bits that do
// not stick, or by DEVICE_NEEDS_RESET.
//
// Files: layout.go says where the registers are, common.go has those of the
// common configuration, status.go activation and reset, notify.go notifications
// and interrupts, and state.go what travels with a migration.
package transport

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
)

// Host is what a transport needs of the machine it is in.
type Host struct {
	Memory        virtio.Memory
	Interrupts    pci.Interrupts
	Notifications Notifications
	// Log gets the guest's errors, and errors of the host that the guest is not
	// told. If it is nil, nothing is logged.
	Log *slog.Logger
}

// Notifications connects the guest's writes to an address with an eventfd,
// without an exit to the VMM: KVM's ioeventfd.
type Notifications interface {
	// AssignIOEventFD makes each write of the guest at gpa, of 2 bytes or of
	// any width, signal the eventfd. The transport also takes writes that
	// arrive at its registers.
	AssignIOEventFD(gpa uint64, fd int) error
	// DeassignIOEventFD undoes it, with the same arguments.
	DeassignIOEventFD(gpa uint64, fd int) error
}

// Transport is one virtio device on PCI.
type Transport struct {
	dev      virtio.Device
	host     Host
	function *pci.Function
	msix     *pci.MSIX
	offered  uint64
	queues   []*queue

	// Atomic, because the device's goroutines use them while a driver that
	// holds regs waits for these goroutines.
	status       atomic.Uint32
	isr          atomic.Uint32
	generation   atomic.Uint32
	configVector atomic.Uint32

	// regs serialises the driver's accesses to the registers with Pause,
	// Resume, SaveState and LoadState. It is held while the device is activated
	// and reset, which the driver waits for. No method of virtio.Notifier takes
	// it. It guards the fields down to places.
	regs           sync.Mutex
	deviceSelect   uint32
	driverSelect   uint32
	driverFeatures uint64
	queueSelect    uint16
	active         bool // the device has been activated, or will be by Resume
	loaded         bool // Resume activates it
	paused         bool

	// places guards the fields below, and where the ioeventfds are.
	places sync.Mutex
	base   uint64 // where the registers are; 0: nowhere
	pumps  sync.WaitGroup
}

// queue is a virtqueue with its registers, its eventfd and its interrupt.
type queue struct {
	*virtio.Queue
	regs    virtio.QueueState // as the driver sets it up; guarded by Transport.regs
	vector  atomic.Uint32
	kick    *kick
	enabled bool   // it has an ioeventfd; guarded by Transport.places, like at
	at      uint64 // where the ioeventfd is; 0: nowhere
	started bool   // guarded by Transport.regs
}

const noVector = 0xffff // VIRTIO_MSI_NO_VECTOR

// New makes the transport of a device. Its PCI function is then to be put on a
// bus. After an error the device has been reset.
func New(dev virtio.Device, host Host) (*Transport, error) {
	if host.Log == nil {
		host.Log = slog.New(slog.DiscardHandler)
	}
	t := &Transport{dev: dev, host: host}
	if err := t.init(); err != nil {
		return nil, errors.Join(fmt.Errorf("virtio device of type %d: %w", dev.ID(), err), t.Close())
	}
	return t, nil
}

func (t *Transport) init() error {
	sizes := t.dev.QueueSizes()
	if len(sizes) < 1 || len(sizes) > maxQueues {
		return fmt.Errorf("the number of queues must be between 1 and %d, got %d", maxQueues, len(sizes))
	}
	t.offered = (t.dev.Features() | virtio.RingFeatures | virtio.FeatureRingReset)
	t.offered |= virtio.FeatureVersion1
	t.configVector.Store(noVector)
	t.function = pci.NewFunction(identity(t.dev.ID()))
	for i, size := range sizes {
		if size == 0 || size > virtio.MaxQueueSize || size&(size-1) != 0 {
			return fmt.Errorf("queue %d: the size must be a power of 2 and at most %d, got %d", i, virtio.MaxQueueSize, size)
		}
		k, err := newKick()
		if err != nil {
			return err
		}
		q := &queue{kick: k}
		q.Queue = virtio.NewQueue(t.host.Memory, size, func() { t.queueInterrupt(q) })
		q.vector.Store(noVector)
		q.regs.Size = size
		t.queues = append(t.queues, q)
		t.pumps.Go(q.pump)
	}
	if err := t.function.AddBAR(registersBAR, pci.BAR{Size: registersSize, Wide: true, Region: registers{t}, Moved: t.moved}); err != nil {
		return err
	}
	var err error
	if t.msix, err = t.function.AddMSIX(msixBAR, len(sizes)+1, t.host.Interrupts, func(err error) { t.host.Log.Error("MSI-X", "err", err) }); err != nil {
		return err
	}
	return t.addCapabilities()
}

// Function is the PCI function to put on a bus.
func (t *Transport) Function() *pci.Function { return t.function }

// Device is the device behind the transport.
func (t *Transport) Device() virtio.Device { return t.dev }

// Negotiated are the features that the driver uses: all that were offered while it
// is choosing, 0 if there is no driver.
func (t *Transport) Negotiated() uint64 {
	t.regs.Lock()
	defer t.regs.Unlock()
	switch status := t.status.Load(); {
	case status&statusFeaturesOK != 0:
		return t.driverFeatures
	case status != 0:
		return t.offered
	}
	return 0
}

// Close resets the device and gives everything back but what the device holds of
// the host. The vCPUs have stopped.
func (t *Transport) Close() error {
	t.regs.Lock()
	defer t.regs.Unlock()
	t.reset()
	var errs []error
	for _, q := range t.queues {
		errs = append(errs, q.kick.close())
	}
	t.pumps.Wait()
	return errors.Join(errs...)
}

// deviceQueues are the queues for the device.
func (t *Transport) deviceQueues() []*virtio.Queue {
	out := make([]*virtio.Queue, len(t.queues))
	for i, q := range t.queues {
		out[i] = q.Queue
	}
	return out
}
