package kvm

import (
	"errors"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// Interrupt chips of the kernel, by the id that [VM.GetIRQChip] and an
// [IRQRoute] take.
const (
	ChipPICMaster uint32 = 0
	ChipPICSlave  uint32 = 1
	ChipIOAPIC    uint32 = 2
)

// IOAPICPins is the number of inputs of the kernel's IOAPIC.
const IOAPICPins = 24

// PITSpeakerDummy makes the kernel emulate port 0x61 (timer 2's gate and output).
const PITSpeakerDummy = 1 << 0

// CreateIRQChip creates the two PICs, the IOAPIC, and a local APIC in each vCPU
// that is created afterwards. The routes are those of [VM.DefaultRoutes].
func (vm *VM) CreateIRQChip() error {
	_, err := again(func() (uintptr, error) { return 0, gokvm.CreateIRQChip(vm.h.raw()) })
	return opError(err, "KVM_CREATE_IRQCHIP", "VM")
}

// pitConfig is struct kvm_pit_config.
type pitConfig struct {
	flags uint32
	_     [15]uint32
}

// CreatePIT2 creates the kernel's 8254 timer, which raises GSI 0. It requires the
// interrupt chips. flags is 0 or PITSpeakerDummy.
func (vm *VM) CreatePIT2(flags uint32) error {
	_, err := vm.h.ioctl(reqCreatePIT2, unsafe.Pointer(&pitConfig{flags: flags}))
	return opError(err, "KVM_CREATE_PIT2", "flags %#x", flags)
}

// irqLevel is struct kvm_irq_level.
type irqLevel struct {
	gsi   uint32
	level uint32
}

// IRQLine sets the level of an interrupt line of the kernel's chips.
func (vm *VM) IRQLine(gsi uint32, level bool) error {
	l := irqLevel{gsi: gsi}
	if level {
		l.level = 1
	}
	if _, err := vm.h.ioctl(reqIRQLine, unsafe.Pointer(&l)); err != nil {
		return opError(err, "KVM_IRQ_LINE", "GSI %d level %d", gsi, l.level)
	}
	return nil
}

// IRQRoute connects a GSI to a pin of a chip or, if MSI is set, to a message. A
// GSI may have one route to each chip.
type IRQRoute struct {
	GSI uint32
	// Chip and Pin are used when MSI is false.
	Chip, Pin uint32
	// MSI makes the route a message: the device's write of Data to Address.
	MSI     bool
	Address uint64
	Data    uint32
}

const (
	routeIRQChip = 1 // KVM_IRQ_ROUTING_IRQCHIP
	routeMSI     = 2 // KVM_IRQ_ROUTING_MSI

	irqRoutingHeaderSize = 8
	// maxIRQRoutes is KVM_MAX_IRQ_ROUTES (include/linux/kvm_host.h).
	maxIRQRoutes = 4096
)

// irqRoutingEntry is struct kvm_irq_routing_entry. Its union begins with chip and
// pin, or with the message's address (low, high) and data.
type irqRoutingEntry struct {
	gsi   uint32
	kind  uint32
	flags uint32
	_     uint32
	union [8]uint32
}

// irqRouting is struct kvm_irq_routing.
type irqRouting struct {
	n       uint32
	flags   uint32
	entries [0]irqRoutingEntry
}

// SetGSIRouting replaces the whole routing table.
func (vm *VM) SetGSIRouting(routes []IRQRoute) error {
	const op = "KVM_SET_GSI_ROUTING"
	if len(routes) > maxIRQRoutes {
		return opError(invalid("expected at most %d", maxIRQRoutes), op, "%d routes", len(routes))
	}
	const entries, size = unsafe.Offsetof(irqRouting{}.entries), unsafe.Sizeof(irqRoutingEntry{})
	words := make([]uint64, (entries+uintptr(len(routes))*size)/8) // both are multiples of 8
	table := unsafe.Pointer(&words[0])
	(*irqRouting)(table).n = uint32(len(routes))
	for i, r := range routes {
		e := (*irqRoutingEntry)(unsafe.Add(table, entries+uintptr(i)*size))
		e.gsi = r.GSI
		if r.MSI {
			e.kind = routeMSI
			e.union = [8]uint32{uint32(r.Address), uint32(r.Address >> 32), r.Data}
		} else {
			e.kind = routeIRQChip
			e.union = [8]uint32{r.Chip, r.Pin}
		}
	}
	_, err := vm.h.ioctl(reqSetGSIRouting, table)
	return opError(err, op, "%d routes", len(routes))
}

// DefaultRoutes returns the kernel's initial table: GSI 0 to 15 to the PICs, and
// GSI n to pin n of the IOAPIC.
func (vm *VM) DefaultRoutes() []IRQRoute {
	routes := make([]IRQRoute, 0, 16+IOAPICPins)
	for gsi := uint32(0); gsi < IOAPICPins; gsi++ {
		switch {
		case gsi < 8:
			routes = append(routes, IRQRoute{GSI: gsi, Chip: ChipPICMaster, Pin: gsi})
		case gsi < 16:
			routes = append(routes, IRQRoute{GSI: gsi, Chip: ChipPICSlave, Pin: gsi - 8})
		}
		routes = append(routes, IRQRoute{GSI: gsi, Chip: ChipIOAPIC, Pin: gsi})
	}
	return routes
}

// msi is struct kvm_msi.
type msi struct {
	addressLow, addressHigh uint32
	data                    uint32
	flags                   uint32
	_                       [16]byte
}

// SignalMSI sends a message: a device's write of data to address. When it returns, the
// interrupt is in the local APICs that the message names. delivered is false if none
// takes it: there is none of that number, or it is off.
func (vm *VM) SignalMSI(address uint64, data uint32) (delivered bool, err error) {
	n, err := vm.h.ioctl(reqSignalMSI, unsafe.Pointer(&msi{addressLow: uint32(address), addressHigh: uint32(address >> 32), data: data}))
	if errors.Is(err, unix.EPERM) { // kvm_irq_delivery_to_apic's -1
		return false, nil
	}
	return n > 0, opError(err, "KVM_SIGNAL_MSI", "address %#x data %#x", address, data)
}

// IRQChip is the state of one chip: struct kvm_irqchip.
type IRQChip struct {
	ChipID uint32 `cbor:"chip_id"`
	_      uint32
	Chip   [512]uint8 `cbor:"chip"` // struct kvm_pic_state or kvm_ioapic_state, zeros after it
}

// GetIRQChip reads the state of a chip: ChipPICMaster, ChipPICSlave or ChipIOAPIC.
func (vm *VM) GetIRQChip(id uint32) (IRQChip, error) {
	chip := IRQChip{ChipID: id}
	_, err := vm.h.ioctl(reqGetIRQChip, unsafe.Pointer(&chip))
	return chip, opError(err, "KVM_GET_IRQCHIP", "chip %d", id)
}

// SetIRQChip loads the state of the chip state.ChipID.
func (vm *VM) SetIRQChip(state IRQChip) error {
	_, err := vm.h.ioctl(reqSetIRQChip, unsafe.Pointer(&state))
	return opError(err, "KVM_SET_IRQCHIP", "chip %d", state.ChipID)
}

// PITState2 is the state of the 8254: struct kvm_pit_state2.
type PITState2 struct {
	Channels [3]PITChannel `cbor:"channels"`
	Flags    uint32        `cbor:"flags"`
	_        [9]uint32
}

// PITChannel is one counter of the 8254: struct kvm_pit_channel_state.
type PITChannel struct {
	Count         uint32 `cbor:"count"`
	LatchedCount  uint16 `cbor:"latched_count"`
	CountLatched  uint8  `cbor:"count_latched"`
	StatusLatched uint8  `cbor:"status_latched"`
	Status        uint8  `cbor:"status"`
	ReadState     uint8  `cbor:"read_state"`
	WriteState    uint8  `cbor:"write_state"`
	WriteLatch    uint8  `cbor:"write_latch"`
	RWMode        uint8  `cbor:"rw_mode"`
	Mode          uint8  `cbor:"mode"`
	BCD           uint8  `cbor:"bcd"`
	Gate          uint8  `cbor:"gate"`
	CountLoadTime int64  `cbor:"count_load_time"` // ns of the host's monotonic clock
}

// GetPIT2 reads the timer's state.
func (vm *VM) GetPIT2() (PITState2, error) {
	var state PITState2
	_, err := vm.h.ioctl(reqGetPIT2, unsafe.Pointer(&state))
	return state, opError(err, "KVM_GET_PIT2", "VM")
}

// SetPIT2 loads the timer's state.
func (vm *VM) SetPIT2(state PITState2) error {
	_, err := vm.h.ioctl(reqSetPIT2, unsafe.Pointer(&state))
	return opError(err, "KVM_SET_PIT2", "VM")
}
