package kvm

import "unsafe"

// IRQFDDeassign detaches an eventfd from its GSI. Pending injections are complete
// when the call returns.
const IRQFDDeassign = 1 << 0

// irqfd is struct kvm_irqfd.
type irqfd struct {
	fd    uint32
	gsi   uint32
	flags uint32
	_     [20]byte
}

// IRQFD makes a write to the eventfd raise the GSI (an edge). With IRQFDDeassign
// it detaches the eventfd.
func (vm *VM) IRQFD(gsi uint32, eventfd int, flags uint32) error {
	if flags&^uint32(IRQFDDeassign) != 0 {
		return opError(invalid("only IRQFDDeassign may be set"), "KVM_IRQFD", "GSI %d flags %#x", gsi, flags)
	}
	_, err := vm.h.ioctl(reqIRQFD, unsafe.Pointer(&irqfd{fd: uint32(eventfd), gsi: gsi, flags: flags}))
	return opError(err, "KVM_IRQFD", "GSI %d eventfd %d flags %#x", gsi, eventfd, flags)
}

// IOEventFDDeassign removes an [IOEventFD]; the rest of it must be as it was.
const IOEventFDDeassign = 1 << 2

// IOEventFD is a guest physical address: a write to it, of any size, signals the
// eventfd FD and does not exit.
type IOEventFD struct {
	Addr  uint64
	FD    int
	Flags uint32
}

// ioeventfd is struct kvm_ioeventfd.
type ioeventfd struct {
	datamatch uint64
	addr      uint64
	len       uint32
	fd        int32
	flags     uint32
	_         [36]byte
}

// IOEventFD registers the address, or with IOEventFDDeassign removes it.
func (vm *VM) IOEventFD(e IOEventFD) error {
	_, err := vm.h.ioctl(reqIOEventFD, unsafe.Pointer(&ioeventfd{addr: e.Addr, fd: int32(e.FD), flags: e.Flags}))
	return opError(err, "KVM_IOEVENTFD", "address %#x eventfd %d flags %#x", e.Addr, e.FD, e.Flags)
}
