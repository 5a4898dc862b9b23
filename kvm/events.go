package kvm

import (
	"fmt"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// LAPICState is the local APIC's register page: struct kvm_lapic_state.
type LAPICState = gokvm.LAPICState

// GetLAPIC reads the local APIC. It needs the kernel's interrupt chips.
func (v *VCPU) GetLAPIC() (LAPICState, error) {
	var l LAPICState
	err := v.state("KVM_GET_LAPIC", reqGetLAPIC, unsafe.Pointer(&l))
	return l, err
}

// SetLAPIC writes the local APIC. The APIC base (in Sregs) must be set before.
func (v *VCPU) SetLAPIC(l LAPICState) error {
	return v.state("KVM_SET_LAPIC", reqSetLAPIC, unsafe.Pointer(&l))
}

// MPState says what a vCPU of a multiprocessor does: KVM_MP_STATE_.
type MPState uint32

// States of a vCPU.
const (
	MPRunnable      = MPState(gokvm.MPStateRunnable)
	MPUninitialized = MPState(gokvm.MPStateUninitialized) // waits for INIT
	MPInitReceived  = MPState(gokvm.MPStateInitReceived)  // waits for SIPI
	MPHalted        = MPState(gokvm.MPStateHalted)
	MPSIPIReceived  = MPState(gokvm.MPStateSipiReceived)
)

// String returns the state's name.
func (s MPState) String() string {
	names := [...]string{"runnable", "uninitialized", "init received", "halted", "sipi received"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("MP state %d", uint32(s))
}

// GetMPState reads what the vCPU does. The kernel first takes a pending INIT or
// SIPI into account, so it is the first thing to save.
func (v *VCPU) GetMPState() (MPState, error) {
	var s gokvm.MPState
	err := v.state("KVM_GET_MP_STATE", reqGetMPState, unsafe.Pointer(&s))
	return MPState(s.State), err
}

// SetMPState sets what the vCPU does.
func (v *VCPU) SetMPState(s MPState) error {
	_, err := v.h.ioctl(reqSetMPState, unsafe.Pointer(&gokvm.MPState{State: uint32(s)}))
	return opError(err, "KVM_SET_MP_STATE", "%s %v", v.what, s)
}

// Flags of [VCPUEvents]: which optional fields are valid.
const (
	EventNMIPending  = 1 << 0
	EventSIPIVector  = 1 << 1
	EventShadow      = 1 << 2
	EventSMM         = 1 << 3
	EventPayload     = 1 << 4 // CapExceptionPayload must be enabled
	EventTripleFault = 1 << 5 // CapX86TripleFaultEvent must be enabled
)

// VCPUEvents are the exceptions, interrupts, NMIs and SMIs that wait to be
// delivered: struct kvm_vcpu_events.
type VCPUEvents struct {
	Exception           EventException
	Interrupt           EventInterrupt
	NMI                 EventNMI
	SIPIVector          uint32
	Flags               uint32
	SMI                 EventSMI
	TripleFault         uint8
	_                   [26]uint8
	ExceptionHasPayload uint8
	ExceptionPayload    uint64
}

// EventException is an exception that waits.
type EventException struct {
	Injected     uint8
	Nr           uint8
	HasErrorCode uint8
	Pending      uint8
	ErrorCode    uint32
}

// EventInterrupt is an interrupt that waits.
type EventInterrupt struct {
	Injected uint8
	Nr       uint8
	Soft     uint8
	Shadow   uint8
}

// EventNMI is an NMI that waits, and whether NMIs are masked.
type EventNMI struct {
	Injected uint8
	Pending  uint8
	Masked   uint8
	_        uint8
}

// EventSMI is system management mode.
type EventSMI struct {
	SMM          uint8
	Pending      uint8
	SMMInsideNMI uint8
	LatchedInit  uint8
}

// GetVCPUEvents reads what waits to be delivered. It is the last thing to save:
// reading other state may move an event on.
func (v *VCPU) GetVCPUEvents() (VCPUEvents, error) {
	var e VCPUEvents
	err := v.state("KVM_GET_VCPU_EVENTS", reqGetVCPUEvents, unsafe.Pointer(&e))
	return e, err
}

// SetVCPUEvents loads what waits to be delivered.
func (v *VCPU) SetVCPUEvents(e VCPUEvents) error {
	_, err := v.h.ioctl(reqSetVCPUEvents, unsafe.Pointer(&e))
	return opError(err, "KVM_SET_VCPU_EVENTS", "%s flags %#x", v.what, e.Flags)
}
