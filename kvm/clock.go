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

// Flags of a [ClockData].
const (
	// ClockTSCStable: every vCPU sees the same clock.
	ClockTSCStable = uint32(gokvm.TSCStable)
	// ClockRealtime: Realtime is the host's CLOCK_REALTIME at that moment.
	ClockRealtime = uint32(gokvm.Realtime)
	// ClockHostTSC: HostTSC is the host's TSC at that moment.
	ClockHostTSC = uint32(gokvm.HostTSC)
)

// GetClock reads the VM's clock. Flags says which fields besides Clock the
// kernel filled in.
func (vm *VM) GetClock() (ClockData, error) {
	var c ClockData
	_, err := vm.h.ioctl(reqGetClock, unsafe.Pointer(&c))
	return c, opError(err, "KVM_GET_CLOCK", "VM")
}

// SetClock sets the VM's clock; it takes what GetClock returned. With
// ClockRealtime, on a kernel that can (CapAdjustClock), the clock is advanced by
// the real time that passed since Realtime was read; the hosts' real-time clocks
// must agree for that. Other flags are dropped: the kernel refuses them here.
func (vm *VM) SetClock(c ClockData) error {
	known, err := vm.CheckExtension(CapAdjustClock)
	if err != nil {
		return err
	}
	c.Flags &= ClockRealtime & uint32(known)
	_, err = vm.h.ioctl(reqSetClock, unsafe.Pointer(&c))
	return opError(err, "KVM_SET_CLOCK", "%d ns flags %#x", c.Clock, c.Flags)
}
