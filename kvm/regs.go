package kvm

import (
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// Register state of a vCPU, as the kernel lays it out.
type (
	// Regs are the general registers: struct kvm_regs.
	Regs = gokvm.Regs
	// Sregs are segments, descriptor tables and control registers: struct
	// kvm_sregs.
	Sregs = gokvm.Sregs
	// Sregs2 is Sregs with the PAE page directory pointers, and without the
	// pending interrupt: struct kvm_sregs2.
	Sregs2 = gokvm.SRegs2
	// Segment is a segment register with its hidden part.
	Segment = gokvm.Segment
	// Descriptor is GDTR or IDTR.
	Descriptor = gokvm.Descriptor
	// DebugRegs are DR0 to DR3, DR6 and DR7: struct kvm_debugregs.
	DebugRegs = gokvm.DebugRegs
	// XCRS are the extended control registers: struct kvm_xcrs.
	XCRS = gokvm.XCRS
	// Translation is where a linear address leads: struct kvm_translation.
	Translation = gokvm.Translation
)

// Sregs2PDPTRsValid is the flag of an [Sregs2] whose PDptrs are to be used.
const Sregs2PDPTRsValid = 1 << 0

// state reads or writes one struct of the vCPU.
func (v *VCPU) state(op string, req uintptr, p unsafe.Pointer) error {
	if _, err := v.h.ioctl(req, p); err != nil {
		return opError(err, op, "%s", v.what)
	}
	return nil
}

// GetRegs reads the general registers.
func (v *VCPU) GetRegs() (Regs, error) {
	var r Regs
	err := v.state("KVM_GET_REGS", reqGetRegs, unsafe.Pointer(&r))
	return r, err
}

// SetRegs writes the general registers.
func (v *VCPU) SetRegs(r Regs) error {
	return v.state("KVM_SET_REGS", reqSetRegs, unsafe.Pointer(&r))
}

// GetSregs reads segments and control registers.
func (v *VCPU) GetSregs() (Sregs, error) {
	var s Sregs
	err := v.state("KVM_GET_SREGS", reqGetSregs, unsafe.Pointer(&s))
	return s, err
}

// SetSregs writes segments and control registers. CPUID must be set before: the
// kernel checks CR4 and EFER against it.
func (v *VCPU) SetSregs(s Sregs) error {
	return v.state("KVM_SET_SREGS", reqSetSregs, unsafe.Pointer(&s))
}

// GetSregs2 reads segments, control registers and PDPTRs. It needs CapSREGS2.
func (v *VCPU) GetSregs2() (Sregs2, error) {
	var s Sregs2
	err := v.state("KVM_GET_SREGS2", reqGetSregs2, unsafe.Pointer(&s))
	return s, err
}

// SetSregs2 writes segments, control registers and PDPTRs. It needs CapSREGS2.
// It does not read the guest's memory, which SetSregs does for PAE paging.
func (v *VCPU) SetSregs2(s Sregs2) error {
	return v.state("KVM_SET_SREGS2", reqSetSregs2, unsafe.Pointer(&s))
}

// GetDebugRegs reads the debug registers.
func (v *VCPU) GetDebugRegs() (DebugRegs, error) {
	var d DebugRegs
	err := v.state("KVM_GET_DEBUGREGS", reqGetDebugRegs, unsafe.Pointer(&d))
	return d, err
}

// SetDebugRegs writes the debug registers.
func (v *VCPU) SetDebugRegs(d DebugRegs) error {
	return v.state("KVM_SET_DEBUGREGS", reqSetDebugRegs, unsafe.Pointer(&d))
}

// GetXCRS reads the extended control registers: XCR0.
func (v *VCPU) GetXCRS() (XCRS, error) {
	var x XCRS
	err := v.state("KVM_GET_XCRS", reqGetXCRS, unsafe.Pointer(&x))
	return x, err
}

// SetXCRS writes the extended control registers. CPUID must be set before.
func (v *VCPU) SetXCRS(x XCRS) error {
	return v.state("KVM_SET_XCRS", reqSetXCRS, unsafe.Pointer(&x))
}

// Translate walks the guest's page tables as they are now. Valid is 0 in the
// answer when the address is not mapped.
func (v *VCPU) Translate(gva uint64) (Translation, error) {
	t := Translation{LinearAddress: gva}
	_, err := v.h.ioctl(reqTranslate, unsafe.Pointer(&t))
	return t, opError(err, "KVM_TRANSLATE", "%s address %#x", v.what, gva)
}
