package kvm

import (
	"sync"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"github.com/govmm/govmm/mempage"
)

// VM is one virtual machine of the kernel: address space, interrupt chips and
// clock. Its vCPUs keep it alive.
type VM struct {
	h            handle
	vcpuMmapSize int
	ringBytes    int // size of each vCPU's dirty ring, 0: none; set before the first vCPU

	// slotsMu guards slots, and keeps it equal to the kernel's: it is held for
	// writing during KVM_SET_USER_MEMORY_REGION, and for reading during the calls
	// in which the kernel derives a bitmap's length from the slot's size.
	slotsMu sync.RWMutex
	slots   map[uint32]uint64 // pages of each registered slot
}

// Close closes the VM. The kernel frees its memory and devices when the last vCPU
// is closed too.
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
		return opError(invalid("expected at most %d arguments, got %d", len(e.args), len(args)), op, "%v", c)
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
		return opError(invalid("expected three pages below 4 GiB"), op, "%#x", addr)
	}
	_, err := again(func() (uintptr, error) { return 0, gokvm.SetTSSAddr(vm.h.raw(), uint32(addr)) })
	return opError(err, op, "%#x", addr)
}

// SetIdentityMapAddr sets the guest physical address of the page that Intel
// processors need for protected mode without paging. Call it before the first vCPU
// is created.
func (vm *VM) SetIdentityMapAddr(addr uint64) error {
	_, err := vm.h.ioctl(reqSetIdentityMapAddr, unsafe.Pointer(&addr))
	return opError(err, "KVM_SET_IDENTITY_MAP_ADDR", "%#x", addr)
}
