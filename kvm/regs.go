package kvm

import (
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// The structs of a saved vCPU have the kernel's layout in memory, and the
// kernel's field names (linux/kvm.h, asm/kvm.h) in CBOR. Padding and flags that
// the kernel reserves are not saved.

// Regs are the general registers: struct kvm_regs.
type Regs struct {
	RAX    uint64 `cbor:"rax"`
	RBX    uint64 `cbor:"rbx"`
	RCX    uint64 `cbor:"rcx"`
	RDX    uint64 `cbor:"rdx"`
	RSI    uint64 `cbor:"rsi"`
	RDI    uint64 `cbor:"rdi"`
	RSP    uint64 `cbor:"rsp"`
	RBP    uint64 `cbor:"rbp"`
	R8     uint64 `cbor:"r8"`
	R9     uint64 `cbor:"r9"`
	R10    uint64 `cbor:"r10"`
	R11    uint64 `cbor:"r11"`
	R12    uint64 `cbor:"r12"`
	R13    uint64 `cbor:"r13"`
	R14    uint64 `cbor:"r14"`
	R15    uint64 `cbor:"r15"`
	RIP    uint64 `cbor:"rip"`
	RFLAGS uint64 `cbor:"rflags"`
}

// Segment is a segment register with its hidden part: struct kvm_segment.
type Segment struct {
	Base     uint64 `cbor:"base"`
	Limit    uint32 `cbor:"limit"`
	Selector uint16 `cbor:"selector"`
	Type     uint8  `cbor:"type"`
	Present  uint8  `cbor:"present"`
	DPL      uint8  `cbor:"dpl"`
	DB       uint8  `cbor:"db"`
	S        uint8  `cbor:"s"`
	L        uint8  `cbor:"l"`
	G        uint8  `cbor:"g"`
	AVL      uint8  `cbor:"avl"`
	Unusable uint8  `cbor:"unusable"`
	_        uint8
}

// Descriptor is GDTR or IDTR: struct kvm_dtable.
type Descriptor struct {
	Base  uint64 `cbor:"base"`
	Limit uint16 `cbor:"limit"`
	_     [3]uint16
}

// Sregs are segments, descriptor tables and control registers: struct
// kvm_sregs.
type Sregs struct {
	CS              Segment    `cbor:"cs"`
	DS              Segment    `cbor:"ds"`
	ES              Segment    `cbor:"es"`
	FS              Segment    `cbor:"fs"`
	GS              Segment    `cbor:"gs"`
	SS              Segment    `cbor:"ss"`
	TR              Segment    `cbor:"tr"`
	LDT             Segment    `cbor:"ldt"`
	GDT             Descriptor `cbor:"gdt"`
	IDT             Descriptor `cbor:"idt"`
	CR0             uint64     `cbor:"cr0"`
	CR2             uint64     `cbor:"cr2"`
	CR3             uint64     `cbor:"cr3"`
	CR4             uint64     `cbor:"cr4"`
	CR8             uint64     `cbor:"cr8"`
	EFER            uint64     `cbor:"efer"`
	APICBase        uint64     `cbor:"apic_base"`
	InterruptBitmap [4]uint64  `cbor:"interrupt_bitmap"`
}

// Sregs2 is [Sregs] with the PAE page directory pointers, and without the
// pending interrupt: struct kvm_sregs2.
type Sregs2 struct {
	CS       Segment    `cbor:"cs"`
	DS       Segment    `cbor:"ds"`
	ES       Segment    `cbor:"es"`
	FS       Segment    `cbor:"fs"`
	GS       Segment    `cbor:"gs"`
	SS       Segment    `cbor:"ss"`
	TR       Segment    `cbor:"tr"`
	LDT      Segment    `cbor:"ldt"`
	GDT      Descriptor `cbor:"gdt"`
	IDT      Descriptor `cbor:"idt"`
	CR0      uint64     `cbor:"cr0"`
	CR2      uint64     `cbor:"cr2"`
	CR3      uint64     `cbor:"cr3"`
	CR4      uint64     `cbor:"cr4"`
	CR8      uint64     `cbor:"cr8"`
	EFER     uint64     `cbor:"efer"`
	APICBase uint64     `cbor:"apic_base"`
	Flags    uint64     `cbor:"flags"` // KVM_SREGS2_FLAGS_PDPTRS_VALID
	PDPTRs   [4]uint64  `cbor:"pdptrs"`
}

// DebugRegs are DR0 to DR3, DR6 and DR7: struct kvm_debugregs.
type DebugRegs struct {
	DB  [4]uint64 `cbor:"db"`
	DR6 uint64    `cbor:"dr6"`
	DR7 uint64    `cbor:"dr7"`
	_   [10]uint64
}

// XCRS are the extended control registers: struct kvm_xcrs.
type XCRS struct {
	Count     uint32 `cbor:"nr_xcrs"` // how many of Registers are in use
	_         uint32
	Registers [16]XCR `cbor:"xcrs"`
	_         [16]uint64
}

// XCR is one extended control register: struct kvm_xcr.
type XCR struct {
	Number uint32 `cbor:"xcr"`
	_      uint32
	Value  uint64 `cbor:"value"`
}

// Translation is the translation of a linear address: struct kvm_translation.
type Translation = gokvm.Translation

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

// SetSregs writes segments and control registers. Set CPUID before: the kernel
// checks CR4 and EFER against it.
func (v *VCPU) SetSregs(s Sregs) error {
	return v.state("KVM_SET_SREGS", reqSetSregs, unsafe.Pointer(&s))
}

// GetSregs2 reads segments, control registers and PDPTRs. It requires CapSREGS2.
func (v *VCPU) GetSregs2() (Sregs2, error) {
	var s Sregs2
	err := v.state("KVM_GET_SREGS2", reqGetSregs2, unsafe.Pointer(&s))
	return s, err
}

// SetSregs2 writes segments, control registers and PDPTRs. It requires CapSREGS2.
// Unlike SetSregs with PAE paging, it does not read the guest's memory.
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

// SetXCRS writes the extended control registers. Set CPUID before.
func (v *VCPU) SetXCRS(x XCRS) error {
	return v.state("KVM_SET_XCRS", reqSetXCRS, unsafe.Pointer(&x))
}

// Translate walks the guest's page tables. Valid is 0 in the result if the address
// is not mapped.
func (v *VCPU) Translate(gva uint64) (Translation, error) {
	t := Translation{LinearAddress: gva}
	_, err := v.h.ioctl(reqTranslate, unsafe.Pointer(&t))
	return t, opError(err, "KVM_TRANSLATE", "%s address %#x", v.what, gva)
}
