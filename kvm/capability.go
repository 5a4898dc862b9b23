package kvm

import gokvm "github.com/bobuhiro11/gokvm/kvm"

// Capability is a KVM_CAP_ number of linux/kvm.h. Every constant of gokvm's kvm
// package is one; those that a machine needs have a name here.
type Capability = gokvm.Capability

// Capabilities of linux/kvm.h.
const (
	CapIRQChip                = gokvm.CapIRQChip
	CapMaxVCPUs               = gokvm.CapMAXVCPUS // largest number of vCPUs
	CapPIT2                   = gokvm.CapPIT2
	CapPITState2              = gokvm.CapPITState2
	CapMPState                = gokvm.CapMPState
	CapVCPUEvents             = gokvm.CapVCPUEvents
	CapDebugRegs              = gokvm.CapDebugRegs
	CapXSAVE                  = gokvm.CapXSave
	CapXCRS                   = gokvm.CapXCRS
	CapSREGS2                 = gokvm.CapSREGS2
	CapAdjustClock            = gokvm.CapAdjustClock // flags that KVM_GET_CLOCK knows
	CapTSCControl             = gokvm.CapTSCControl
	CapTSCDeadlineTimer       = gokvm.CapTSCDeadlineTimer
	CapImmediateExit          = gokvm.CapImmediateExit
	CapManualDirtyLogProtect2 = gokvm.CapManualDirtyLogProtect2 // DirtyLog flags that may be enabled
	CapExceptionPayload       = gokvm.CapExceptionPayload
	CapX86TripleFaultEvent    = gokvm.CapX86TripleFaultEvent
)

// Flags of CapManualDirtyLogProtect2 (Documentation/virt/kvm/api.rst, 7.12).
const (
	// DirtyLogManualProtect: KVM_GET_DIRTY_LOG does not clear the log, only
	// KVM_CLEAR_DIRTY_LOG does.
	DirtyLogManualProtect = 1 << 0
	// DirtyLogInitiallySet: every page of a slot is dirty when its logging is
	// turned on, and is write-protected when it is cleared.
	DirtyLogInitiallySet = 1 << 1
)
