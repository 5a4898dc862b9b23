package kvm

import (
	"fmt"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// LAPICState is the local APIC's register page: struct kvm_lapic_state.
type LAPICState struct {
	Regs [1024]uint8 `cbor:"regs"`
}

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

// MPState is a vCPU's multiprocessing state: KVM_MP_STATE_.
type MPState uint32

// States of a vCPU.
const (
	MPUninitialized = MPState(gokvm.MPStateUninitialized) // waits for INIT
	MPHalted        = MPState(gokvm.MPStateHalted)
)

// String returns the state's name.
func (s MPState) String() string {
	names := [...]string{"runnable", "uninitialized", "INIT received", "halted", "SIPI received"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("MP state %d", uint32(s))
}

// GetMPState reads the multiprocessing state. The kernel first handles a pending
// INIT or SIPI, which changes other state: save this state first.
func (v *VCPU) GetMPState() (MPState, error) {
	var s gokvm.MPState
	err := v.state("KVM_GET_MP_STATE", reqGetMPState, unsafe.Pointer(&s))
	return MPState(s.State), err
}

// SetMPState sets the multiprocessing state.
func (v *VCPU) SetMPState(s MPState) error {
	_, err := v.h.ioctl(reqSetMPState, unsafe.Pointer(&gokvm.MPState{State: uint32(s)}))
	return opError(err, "KVM_SET_MP_STATE", "%s %v", v.what, s)
}

// Flags of [VCPUEvents]: which optional fields are valid.
const (
	EventShadow      = 1 << 2
	EventPayload     = 1 << 4 // CapExceptionPayload must be enabled
	EventTripleFault = 1 << 5 // CapX86TripleFaultEvent must be enabled
)

// VCPUEvents are the exceptions, interrupts, NMIs and SMIs that KVM has yet to
// deliver: struct kvm_vcpu_events.
type VCPUEvents struct {
	Exception           EventException `cbor:"exception"`
	Interrupt           EventInterrupt `cbor:"interrupt"`
	NMI                 EventNMI       `cbor:"nmi"`
	SIPIVector          uint32         `cbor:"sipi_vector"`
	Flags               uint32         `cbor:"flags"`
	SMI                 EventSMI       `cbor:"smi"`
	TripleFault         uint8          `cbor:"triple_fault"`
	_                   [26]uint8
	ExceptionHasPayload uint8  `cbor:"exception_has_payload"`
	ExceptionPayload    uint64 `cbor:"exception_payload"`
}

// EventException is a pending or injected exception.
type EventException struct {
	Injected     uint8  `cbor:"injected"`
	Vector       uint8  `cbor:"nr"`
	HasErrorCode uint8  `cbor:"has_error_code"`
	Pending      uint8  `cbor:"pending"`
	ErrorCode    uint32 `cbor:"error_code"`
}

// EventInterrupt is an injected interrupt, and the interrupt shadow.
type EventInterrupt struct {
	Injected uint8 `cbor:"injected"`
	Vector   uint8 `cbor:"nr"`
	Soft     uint8 `cbor:"soft"`
	Shadow   uint8 `cbor:"shadow"`
}

// EventNMI is a pending or injected NMI, and whether NMIs are masked.
type EventNMI struct {
	Injected uint8 `cbor:"injected"`
	Pending  uint8 `cbor:"pending"`
	Masked   uint8 `cbor:"masked"`
	_        uint8
}

// EventSMI is the state of system management mode.
type EventSMI struct {
	SMM          uint8 `cbor:"smm"`
	Pending      uint8 `cbor:"pending"`
	SMMInsideNMI uint8 `cbor:"smm_inside_nmi"`
	LatchedInit  uint8 `cbor:"latched_init"`
}

// GetVCPUEvents reads the pending events. Save them last: reading other state may
// change them.
func (v *VCPU) GetVCPUEvents() (VCPUEvents, error) {
	var e VCPUEvents
	err := v.state("KVM_GET_VCPU_EVENTS", reqGetVCPUEvents, unsafe.Pointer(&e))
	return e, err
}

// SetVCPUEvents loads the pending events.
func (v *VCPU) SetVCPUEvents(e VCPUEvents) error {
	_, err := v.h.ioctl(reqSetVCPUEvents, unsafe.Pointer(&e))
	return opError(err, "KVM_SET_VCPU_EVENTS", "%s flags %#x", v.what, e.Flags)
}
