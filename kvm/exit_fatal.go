package kvm

import (
	"encoding/binary"
	"fmt"
)

// Suberrors of KVM_EXIT_INTERNAL_ERROR.
const (
	// InternalErrorEmulation: the kernel cannot emulate an instruction.
	InternalErrorEmulation = 1
	// InternalErrorSimulEx: two exceptions at once.
	InternalErrorSimulEx = 2
	// InternalErrorDeliveryEv: an exit while an event was delivered.
	InternalErrorDeliveryEv = 3
	// InternalErrorUnexpectedExit: the processor exited for a reason that is
	// unknown to the kernel.
	InternalErrorUnexpectedExit = 4
)

// emulationHasBytes is KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES.
const emulationHasBytes = 1 << 0

// InternalErrorExit is KVM's own failure (KVM_EXIT_INTERNAL_ERROR).
type InternalErrorExit struct {
	Suberror uint32
	// Data is what the kernel adds; its meaning depends on Suberror.
	Data []uint64
}

// InternalError decodes the failure; valid when ExitReason is ExitInternalError.
func (v *VCPU) InternalError() InternalErrorExit {
	u := v.union()
	return InternalErrorExit{Suberror: binary.LittleEndian.Uint32(u), Data: words(u)}
}

// words decodes a count at offset 4 and that many words at offset 8, at most
// sixteen: the layout of kvm_run.internal and kvm_run.system_event.
func words(u []byte) []uint64 {
	n := min(binary.LittleEndian.Uint32(u[4:]), 16)
	data := make([]uint64, n)
	for i := range data {
		data[i] = binary.LittleEndian.Uint64(u[8+8*i:])
	}
	return data
}

// Instruction returns the bytes of the instruction that KVM could not emulate,
// or nil if the kernel does not report them. The kernel reports what it fetched,
// which may be more than one instruction.
func (e InternalErrorExit) Instruction() []byte {
	// struct kvm_run.emulation_failure: flags, then the size and fifteen bytes.
	if e.Suberror != InternalErrorEmulation || len(e.Data) < 3 || e.Data[0]&emulationHasBytes == 0 {
		return nil
	}
	var raw [16]byte
	binary.LittleEndian.PutUint64(raw[:], e.Data[1])
	binary.LittleEndian.PutUint64(raw[8:], e.Data[2])
	return raw[1 : 1+min(int(raw[0]), 15)]
}

// String describes the error, with the instruction's bytes if known.
func (e InternalErrorExit) String() string {
	var text string
	switch e.Suberror {
	case InternalErrorEmulation:
		if b := e.Instruction(); b != nil {
			return fmt.Sprintf("KVM cannot emulate the instruction that begins % x", b)
		}
		text = "KVM cannot emulate an instruction"
	case InternalErrorSimulEx:
		text = "two exceptions at once"
	case InternalErrorDeliveryEv:
		text = "an exit while an event was delivered"
	case InternalErrorUnexpectedExit:
		text = "the processor exited for a reason that is unknown to KVM"
	default:
		text = fmt.Sprintf("suberror %d", e.Suberror)
	}
	if len(e.Data) == 0 {
		return text
	}
	return fmt.Sprintf("%s, data %#x", text, e.Data)
}

// FailEntryExit is a processor's refusal to enter the guest
// (KVM_EXIT_FAIL_ENTRY).
type FailEntryExit struct {
	// Reason is the hardware's own code.
	Reason uint64
	// CPU is the host processor.
	CPU uint32
}

// FailEntry decodes the refusal; valid when ExitReason is ExitFailEntry.
func (v *VCPU) FailEntry() FailEntryExit {
	u := v.union()
	return FailEntryExit{Reason: binary.LittleEndian.Uint64(u), CPU: binary.LittleEndian.Uint32(u[8:])}
}

// Kinds of a [SystemEventExit].
const (
	SystemEventShutdown = 1
	SystemEventReset    = 2
)

// SystemEventExit is a request to the whole machine (KVM_EXIT_SYSTEM_EVENT).
type SystemEventExit struct {
	Type uint32
	Data []uint64
}

// SystemEvent decodes the request; valid when ExitReason is ExitSystemEvent.
func (v *VCPU) SystemEvent() SystemEventExit {
	u := v.union()
	return SystemEventExit{Type: binary.LittleEndian.Uint32(u), Data: words(u)}
}
