package kvm

import (
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// ClockData is the VM's kvmclock: struct kvm_clock_data. Clock and Realtime are
// in nanoseconds.
type ClockData struct {
	Clock    uint64 `cbor:"clock"`
	Flags    uint32 `cbor:"flags"`
	_        uint32
	Realtime uint64 `cbor:"realtime"`
	HostTSC  uint64 `cbor:"host_tsc"`
	_        [4]uint32
}

// ClockRealtime is the flag of a [ClockData] whose Realtime is the host's
// CLOCK_REALTIME at the moment of the reading.
const ClockRealtime = uint32(gokvm.Realtime)

// GetClock reads the VM's clock. Flags says which fields besides Clock the
// kernel has filled in.
func (vm *VM) GetClock() (ClockData, error) {
	var c ClockData
	_, err := vm.h.ioctl(reqGetClock, unsafe.Pointer(&c))
	return c, opError(err, "KVM_GET_CLOCK", "VM")
}

// SetClock sets the VM's clock to what GetClock returned. With ClockRealtime, the
// kernel adds the real time that has passed since Realtime was read, if it has
// CapAdjustClock; this requires that the real-time clocks of both hosts agree.
// SetClock clears all other flags, which the kernel refuses here.
func (vm *VM) SetClock(c ClockData) error {
	known, err := vm.CheckExtension(CapAdjustClock)
	if err != nil {
		return err
	}
	c.Flags &= ClockRealtime & uint32(known)
	_, err = vm.h.ioctl(reqSetClock, unsafe.Pointer(&c))
	return opError(err, "KVM_SET_CLOCK", "%d ns flags %#x", c.Clock, c.Flags)
}
