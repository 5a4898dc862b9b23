package kvm

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// ExitReason is a KVM_EXIT_ number of linux/kvm.h.
type ExitReason uint32

// Exit reasons. Those above 17 are not in gokvm.
const (
	ExitUnknown       = ExitReason(gokvm.EXITUNKNOWN)
	ExitException     = ExitReason(gokvm.EXITEXCEPTION)
	ExitIO            = ExitReason(gokvm.EXITIO)
	ExitHypercall     = ExitReason(gokvm.EXITHYPERCALL)
	ExitDebug         = ExitReason(gokvm.EXITDEBUG)
	ExitHLT           = ExitReason(gokvm.EXITHLT)
	ExitMMIO          = ExitReason(gokvm.EXITMMIO)
	ExitIRQWindowOpen = ExitReason(gokvm.EXITIRQWINDOWOPEN)
	ExitShutdown      = ExitReason(gokvm.EXITSHUTDOWN)
	ExitFailEntry     = ExitReason(gokvm.EXITFAILENTRY)
	ExitIntr          = ExitReason(gokvm.EXITINTR)
	ExitSetTPR        = ExitReason(gokvm.EXITSETTPR)
	ExitTPRAccess     = ExitReason(gokvm.EXITTPRACCESS)
	ExitNMI           = ExitReason(gokvm.EXITNMI)
	ExitInternalError = ExitReason(gokvm.EXITINTERNALERROR)
	ExitSystemEvent   = ExitReason(24)
	ExitIOAPICEOI     = ExitReason(26)
	ExitHyperV        = ExitReason(27)
	ExitX86RDMSR      = ExitReason(29)
	ExitX86WRMSR      = ExitReason(30)
	ExitDirtyRingFull = ExitReason(31)
	ExitX86BusLock    = ExitReason(33)
	ExitNotify        = ExitReason(37)
	ExitMemoryFault   = ExitReason(39)
)

var exitNames = map[ExitReason]string{
	ExitUnknown:       "KVM_EXIT_UNKNOWN",
	ExitException:     "KVM_EXIT_EXCEPTION",
	ExitIO:            "KVM_EXIT_IO",
	ExitHypercall:     "KVM_EXIT_HYPERCALL",
	ExitDebug:         "KVM_EXIT_DEBUG",
	ExitHLT:           "KVM_EXIT_HLT",
	ExitMMIO:          "KVM_EXIT_MMIO",
	ExitIRQWindowOpen: "KVM_EXIT_IRQ_WINDOW_OPEN",
	ExitShutdown:      "KVM_EXIT_SHUTDOWN",
	ExitFailEntry:     "KVM_EXIT_FAIL_ENTRY",
	ExitIntr:          "KVM_EXIT_INTR",
	ExitSetTPR:        "KVM_EXIT_SET_TPR",
	ExitTPRAccess:     "KVM_EXIT_TPR_ACCESS",
	ExitNMI:           "KVM_EXIT_NMI",
	ExitInternalError: "KVM_EXIT_INTERNAL_ERROR",
	ExitSystemEvent:   "KVM_EXIT_SYSTEM_EVENT",
	ExitIOAPICEOI:     "KVM_EXIT_IOAPIC_EOI",
	ExitHyperV:        "KVM_EXIT_HYPERV",
	ExitX86RDMSR:      "KVM_EXIT_X86_RDMSR",
	ExitX86WRMSR:      "KVM_EXIT_X86_WRMSR",
	ExitDirtyRingFull: "KVM_EXIT_DIRTY_RING_FULL",
	ExitX86BusLock:    "KVM_EXIT_X86_BUS_LOCK",
	ExitNotify:        "KVM_EXIT_NOTIFY",
	ExitMemoryFault:   "KVM_EXIT_MEMORY_FAULT",
}

// String returns the kernel's name, or the number of one that is not known here.
func (r ExitReason) String() string {
	if name, ok := exitNames[r]; ok {
		return name
	}
	return fmt.Sprintf("KVM_EXIT_%d", uint32(r))
}

// run returns the head of the shared area, or nil after Close.
func (v *VCPU) run() *gokvm.RunData {
	return (*gokvm.RunData)(unsafe.Pointer(unsafe.SliceData(v.area)))
}

// union returns the part of struct kvm_run that depends on the exit reason, or
// nil after Close. struct kvm_run pads it to 256 bytes.
func (v *VCPU) union() []byte {
	const at = unsafe.Offsetof(gokvm.RunData{}.Data)
	if v.area == nil {
		return make([]byte, unsafe.Sizeof(gokvm.RunData{}.Data))
	}
	return v.area[at : at+unsafe.Sizeof(gokvm.RunData{}.Data)]
}

// ExitReason says why the last Run that returned nil did.
func (v *VCPU) ExitReason() ExitReason {
	if v.area == nil {
		return ExitUnknown
	}
	return ExitReason(v.run().ExitReason)
}

// IOExit is a port access (KVM_EXIT_IO).
type IOExit struct {
	Port uint16
	// Size is the width of one access in bytes, Count the number of accesses
	// (REP INS, REP OUTS), one after another in Data.
	Size  int
	Count int
	// In says that the guest reads: Data is to be filled in before the next Run.
	In bool
	// Data is Size*Count bytes of the area shared with the kernel, valid until
	// the next Run. It is nil if the kernel's numbers do not fit the area.
	Data []byte
}

// IO decodes the port access; valid when ExitReason is ExitIO. It does not
// allocate.
func (v *VCPU) IO() IOExit {
	if v.area == nil {
		return IOExit{}
	}
	direction, size, port, count, offset := v.run().IO()
	e := IOExit{Port: uint16(port), Size: int(size), Count: int(count), In: direction == gokvm.EXITIOIN}
	// size is below 2^8 and count below 2^32: the product does not overflow.
	if n, area := size*count, uint64(len(v.area)); n <= area && offset <= area-n {
		e.Data = v.area[offset : offset+n : offset+n]
	}
	return e
}

// MMIOExit is an access to guest physical memory that no slot covers, or a write
// to a read-only slot (KVM_EXIT_MMIO).
type MMIOExit struct {
	Addr uint64
	// Data has one to eight bytes of the area shared with the kernel, valid until
	// the next Run; a read is answered in it. It is nil if the kernel's length is
	// out of bounds.
	Data  []byte
	Write bool
}

// MMIO decodes the access; valid when ExitReason is ExitMMIO. It does not
// allocate.
func (v *VCPU) MMIO() MMIOExit {
	if v.area == nil {
		return MMIOExit{}
	}
	u := v.union()
	e := MMIOExit{Addr: binary.LittleEndian.Uint64(u), Write: u[20] != 0}
	if n := binary.LittleEndian.Uint32(u[16:]); n <= 8 {
		e.Data = u[8 : 8+n : 8+n]
	}
	return e
}

// Hypercall is a hypercall for user space (KVM_EXIT_HYPERCALL).
type Hypercall struct {
	Number uint64
	Args   [6]uint64
	Flags  uint64
}

// Hypercall decodes the call; valid when ExitReason is ExitHypercall.
func (v *VCPU) Hypercall() Hypercall {
	u := v.union()
	h := Hypercall{Number: binary.LittleEndian.Uint64(u), Flags: binary.LittleEndian.Uint64(u[64:])}
	for i := range h.Args {
		h.Args[i] = binary.LittleEndian.Uint64(u[8+8*i:])
	}
	return h
}

// SetHypercallResult answers the hypercall, before the next Run.
func (v *VCPU) SetHypercallResult(ret uint64) {
	binary.LittleEndian.PutUint64(v.union()[56:], ret)
}
