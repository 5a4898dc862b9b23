package transport

import (
	"encoding/binary"

	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
)

// The registers' BAR: one page for each structure.
const (
	registersBAR  = 0 // and 1: it has 64 bits
	msixBAR       = 2
	registersSize = 0x4000

	commonAt   = 0x0000
	commonSize = 0x40
	isrAt      = 0x1000
	isrSize    = 1
	deviceAt   = 0x2000
	deviceSize = 0x1000
	notifyAt   = 0x3000
	notifySize = 0x1000

	// notifyStep is notify_off_multiplier: the distance in bytes of the queues'
	// notification addresses. Each queue has its own, so that the address alone
	// identifies the queue.
	notifyStep = 4
	maxQueues  = notifySize / notifyStep
)

// Types of the vendor capabilities, 4.1.4.
const (
	capCommon = 1
	capNotify = 2
	capISR    = 3
	capDevice = 4
	capPCI    = 5
)

// identity is section 4.1.2: non-transitional device ids, revision 1. The
// standard does not define the class, which tools that list the bus show.
func identity(deviceType uint16) pci.Identity {
	class := uint32(0xff0000) // no defined class
	switch deviceType {
	case virtio.IDNet:
		class = 0x020000 // Ethernet
	case virtio.IDBlock:
		class = 0x018000 // mass storage, other
	case virtio.IDConsole:
		class = 0x078000 // communication, other
	case virtio.IDVsock:
		class = 0x028000 // network, other
	}
	id := 0x1040 + deviceType
	return pci.Identity{Vendor: 0x1af4, Device: id, SubVendor: 0x1af4, SubDevice: id, Class: class, Revision: 1}
}

// addCapabilities adds the capabilities that locate the structures (4.1.4).
func (t *Transport) addCapabilities() error {
	for _, c := range []struct {
		kind     byte
		at, size uint32
		tail     []byte
	}{
		{capCommon, commonAt, commonSize, nil},
		{capNotify, notifyAt, notifySize, binary.LittleEndian.AppendUint32(nil, notifyStep)},
		{capISR, isrAt, isrSize, nil},
		{capDevice, deviceAt, deviceSize, nil},
	} {
		data := vendorCap(c.kind, c.at, c.size, c.tail)
		if err := t.function.AddCapability(pci.Capability{ID: pci.CapVendor, Data: data}); err != nil {
			return err
		}
	}
	return t.addPCICap()
}

// vendorCap is struct virtio_pci_cap behind its first two bytes.
func vendorCap(kind byte, at, size uint32, tail []byte) []byte {
	data := []byte{byte(16 + len(tail)), kind, registersBAR, 0, 0, 0}
	data = binary.LittleEndian.AppendUint32(data, at)
	data = binary.LittleEndian.AppendUint32(data, size)
	return append(data, tail...)
}

// Offsets in the data of the PCI configuration access capability (4.1.4.9): a
// window through which the driver reaches a BAR without mapping it.
const (
	windowBAR    = 2
	windowOffset = 6
	windowLength = 10
	windowData   = 14
	windowEnd    = 18
)

func (t *Transport) addPCICap() error {
	data := vendorCap(capPCI, 0, 0, make([]byte, 4))
	mask := make([]byte, len(data))
	mask[windowBAR] = 0xff
	for i := windowOffset; i < windowEnd; i++ {
		mask[i] = 0xff
	}
	through := func(write bool) func([]byte, int, int) {
		return func(data []byte, off, n int) {
			if off >= windowEnd || off+n <= windowData {
				return
			}
			at, length := binary.LittleEndian.Uint32(data[windowOffset:]), binary.LittleEndian.Uint32(data[windowLength:])
			if length != 1 && length != 2 && length != 4 || at%length != 0 {
				return
			}
			t.function.AccessBAR(int(data[windowBAR]), uint64(at), data[windowData:windowData+length], write)
		}
	}
	return t.function.AddCapability(pci.Capability{
		ID: pci.CapVendor, Data: data, Writable: mask, BeforeRead: through(false), AfterWrite: through(true),
	})
}
