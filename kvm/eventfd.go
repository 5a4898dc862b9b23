package kvm

import "unsafe"

// IRQFDDeassign takes an eventfd off its GSI; pending injections are done when
// the call returns.
const IRQFDDeassign = 1 << 0

// irqfdResample is KVM_IRQFD_FLAG_RESAMPLE.
const irqfdResample = 1 << 1

// irqfd is struct kvm_irqfd.
type irqfd struct {
	fd       uint32
	gsi      uint32
	flags    uint32
	resample uint32
	_        [16]byte
}

// IRQFD makes a write to the eventfd raise the GSI (an edge), or with
// IRQFDDeassign no longer do so.
func (vm *VM) IRQFD(gsi uint32, eventfd int, flags uint32) error {
	if flags&^uint32(IRQFDDeassign) != 0 {
		return opError(invalid("only IRQFDDeassign may be set"), "KVM_IRQFD", "GSI %d flags %#x", gsi, flags)
	}
	return vm.irqfd(irqfd{fd: uint32(eventfd), gsi: gsi, flags: flags})
}

// IRQFDResample makes a write to the eventfd raise the GSI and hold it until the
// guest's end of interrupt, which lowers it and signals resample, so that a
// device whose condition persists raises it again. IRQFD with IRQFDDeassign
// takes it off.
func (vm *VM) IRQFDResample(gsi uint32, eventfd, resample int) error {
	return vm.irqfd(irqfd{fd: uint32(eventfd), gsi: gsi, flags: irqfdResample, resample: uint32(resample)})
}

func (vm *VM) irqfd(i irqfd) error {
	_, err := vm.h.ioctl(reqIRQFD, unsafe.Pointer(&i))
	return opError(err, "KVM_IRQFD", "GSI %d eventfd %d flags %#x", i.gsi, int32(i.fd), i.flags)
}

// Flags of an [IOEventFD].
const (
	// IOEventFDDatamatch: only writes of Datamatch count.
	IOEventFDDatamatch = 1 << 0
	// IOEventFDPIO: Addr is a port.
	IOEventFDPIO = 1 << 1
	// IOEventFDDeassign takes it away; the rest must be as it was.
	IOEventFDDeassign = 1 << 2
)

// IOEventFD is a place whose writes by the guest signal an eventfd instead of
// exiting.
type IOEventFD struct {
	Datamatch uint64
	// Addr is a guest physical address, or a port with IOEventFDPIO.
	Addr uint64
	// Len is the width of the write in bytes: 1, 2, 4, 8, or 0 for any.
	Len   uint32
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

// IOEventFD registers the place, or with IOEventFDDeassign removes it.
func (vm *VM) IOEventFD(e IOEventFD) error {
	k := ioeventfd{datamatch: e.Datamatch, addr: e.Addr, len: e.Len, fd: int32(e.FD), flags: e.Flags}
	_, err := vm.h.ioctl(reqIOEventFD, unsafe.Pointer(&k))
	return opError(err, "KVM_IOEVENTFD", "address %#x length %d eventfd %d flags %#x", e.Addr, e.Len, e.FD, e.Flags)
}
