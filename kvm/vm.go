package kvm

import (
	"sync"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"github.com/govmm/govmm/mempage"
)

// VM is one virtual machine of the kernel: address space, interrupt chips,
// clock. Its vCPUs hold it open.
type VM struct {
	h            handle
	vcpuMmapSize int
	ringBytes    int // of each vCPU's dirty ring, 0: none; written before there are vCPUs

	// slotsMu guards slots, and that it agrees with the kernel's: it is held for
	// writing over KVM_SET_USER_MEMORY_REGION and for reading over the calls
	// whose bitmap the kernel measures by the slot's size.
	slotsMu sync.RWMutex
	slots   map[uint32]uint64 // pages of each registered slot
}

// Close gives up the VM. Its memory and devices go when the last vCPU is closed
// as well.
func (vm *VM) Close() error {
	return opError(vm.h.close(), "close", "VM")
}

// CheckExtension returns the capability's value for this VM, see
// [System.CheckExtension].
func (vm *VM) CheckExtension(c Capability) (int, error) {
	return vm.h.checkExtension(c, "VM")
}

// enableCap is struct kvm_enable_cap.
type enableCap struct {
	cap   uint32
	flags uint32
	args  [4]uint64
	_     [64]byte
}

// EnableCap turns a capability on, with up to four arguments.
func (vm *VM) EnableCap(c Capability, args ...uint64) error {
	const op = "KVM_ENABLE_CAP"
	e := &enableCap{cap: uint32(c)}
	if len(args) > len(e.args) {
		return opError(invalid("%d arguments, at most %d", len(args), len(e.args)), op, "%v", c)
	}
	copy(e.args[:], args)
	_, err := vm.h.ioctl(reqEnableCap, unsafe.Pointer(e))
	return opError(err, op, "%v %#x", c, args)
}

// SetTSSAddr sets the guest physical address of the three pages below 4 GiB
// that Intel processors need for real mode; no slot may cover them.
func (vm *VM) SetTSSAddr(addr uint64) error {
	const op = "KVM_SET_TSS_ADDR"
	if addr > 1<<32-3*mempage.Size {
		return opError(invalid("three pages below 4 GiB are needed"), op, "%#x", addr)
	}
	_, err := again(func() (uintptr, error) { return 0, gokvm.SetTSSAddr(vm.h.raw(), uint32(addr)) })
	return opError(err, op, "%#x", addr)
}

// SetIdentityMapAddr sets the guest physical address of the page that Intel
// processors need for protected mode without paging. It must be set before the
// first vCPU is made.
func (vm *VM) SetIdentityMapAddr(addr uint64) error {
	_, err := vm.h.ioctl(reqSetIdentityMapAddr, unsafe.Pointer(&addr))
	return opError(err, "KVM_SET_IDENTITY_MAP_ADDR", "%#x", addr)
}
