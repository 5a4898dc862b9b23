package kvm

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// ExitReason is a KVM_EXIT_ number of linux/kvm.h.
type ExitReason uint32

// Exit reasons that a machine handles.
const (
	ExitIO            ExitReason = 2
	ExitHypercall     ExitReason = 3
	ExitHLT           ExitReason = 5
	ExitMMIO          ExitReason = 6
	ExitIRQWindowOpen ExitReason = 7
	ExitShutdown      ExitReason = 8
	ExitFailEntry     ExitReason = 9
	ExitIntr          ExitReason = 10
	ExitInternalError ExitReason = 17
	ExitSystemEvent   ExitReason = 24
	ExitDirtyRingFull ExitReason = 31
)

var exitNames = map[ExitReason]string{
	0:                 "KVM_EXIT_UNKNOWN",
	1:                 "KVM_EXIT_EXCEPTION",
	ExitIO:            "KVM_EXIT_IO",
	ExitHypercall:     "KVM_EXIT_HYPERCALL",
	4:                 "KVM_EXIT_DEBUG",
	ExitHLT:           "KVM_EXIT_HLT",
	ExitMMIO:          "KVM_EXIT_MMIO",
	ExitIRQWindowOpen: "KVM_EXIT_IRQ_WINDOW_OPEN",
	ExitShutdown:      "KVM_EXIT_SHUTDOWN",
	ExitFailEntry:     "KVM_EXIT_FAIL_ENTRY",
	ExitIntr:          "KVM_EXIT_INTR",
	11:                "KVM_EXIT_SET_TPR",
	12:                "KVM_EXIT_TPR_ACCESS",
	16:                "KVM_EXIT_NMI",
	ExitInternalError: "KVM_EXIT_INTERNAL_ERROR",
	ExitSystemEvent:   "KVM_EXIT_SYSTEM_EVENT",
	26:                "KVM_EXIT_IOAPIC_EOI",
	27:                "KVM_EXIT_HYPERV",
	29:                "KVM_EXIT_X86_RDMSR",
	30:                "KVM_EXIT_X86_WRMSR",
	ExitDirtyRingFull: "KVM_EXIT_DIRTY_RING_FULL",
	33:                "KVM_EXIT_X86_BUS_LOCK",
	37:                "KVM_EXIT_NOTIFY",
	exitMemoryFault:   "KVM_EXIT_MEMORY_FAULT",
}

// exitMemoryFault is new in Linux 6.8.
const exitMemoryFault ExitReason = 39

// String returns the kernel's name, or the number of an unknown reason.
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

// ExitReason says why the last Run that returned nil exited.
func (v *VCPU) ExitReason() ExitReason {
	if v.area == nil {
		return 0
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
	// In says that the guest reads: fill in Data before the next Run.
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
	// Data is one to eight bytes of the area shared with the kernel, valid until
	// the next Run. Fill it in to answer a read. It is nil if the kernel's length
	// is out of bounds.
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

// SetHypercallResult answers the hypercall, before the next Run.
func (v *VCPU) SetHypercallResult(ret uint64) {
	binary.LittleEndian.PutUint64(v.union()[56:], ret)
}
