package kvm

import gokvm "github.com/bobuhiro11/gokvm/kvm"

// Capability is a KVM_CAP_ number of linux/kvm.h. Any constant of gokvm's kvm
// package may be passed; those that a migrating hypervisor asks for are named
// here as well.
type Capability = gokvm.Capability

// Capabilities of linux/kvm.h.
const (
	CapIRQChip                = gokvm.CapIRQChip
	CapUserMemory             = gokvm.CapUserMemory
	CapNRVCPUs                = gokvm.CapNRVCPUS  // recommended number of vCPUs
	CapMaxVCPUs               = gokvm.CapMAXVCPUS // largest number of vCPUs
	CapNRMemSlots             = gokvm.CapNRMemSlots
	CapIRQRouting             = gokvm.CapIRQRouting // largest number of routes
	CapIRQFD                  = gokvm.CapIRQFD
	CapIRQFDResample          = gokvm.CapIRQFDResample
	CapIOEventFD              = gokvm.CapIOEventFD
	CapPIT2                   = gokvm.CapPIT2
	CapPITState2              = gokvm.CapPITState2
	CapMPState                = gokvm.CapMPState
	CapVCPUEvents             = gokvm.CapVCPUEvents
	CapDebugRegs              = gokvm.CapDebugRegs
	CapXSAVE                  = gokvm.CapXSave
	CapXSAVE2                 = gokvm.CapXSave2 // size of the state in bytes
	CapXCRS                   = gokvm.CapXCRS
	CapSREGS2                 = gokvm.CapSREGS2
	CapNestedState            = gokvm.CapNestedState // largest size in bytes
	CapAdjustClock            = gokvm.CapAdjustClock // flags that KVM_GET_CLOCK knows
	CapKVMClockCtrl           = gokvm.CapKVMClockCtrl
	CapTSCControl             = gokvm.CapTSCControl
	CapGetTSCKHz              = gokvm.CapGetTSCkHz
	CapTSCDeadlineTimer       = gokvm.CapTSCDeadlineTimer
	CapVCPUAttributes         = gokvm.CapVCPUAttributes
	CapSysAttributes          = gokvm.CapSysAttributes
	CapImmediateExit          = gokvm.CapImmediateExit
	CapReadonlyMem            = gokvm.CapReadOnlyMEM
	CapGetMSRFeatures         = gokvm.CapGETMSRFeatures
	CapManualDirtyLogProtect2 = gokvm.CapManualDirtyLogProtect2 // DirtyLog flags that may be enabled
	CapDirtyLogRing           = gokvm.CapDirtyLogRing
	CapDirtyLogRingAcqRel     = gokvm.CapDirtyLogRingACQRel
	CapExceptionPayload       = gokvm.CapExceptionPayload
	CapX86TripleFaultEvent    = gokvm.CapX86TripleFaultEvent
	CapX2APICAPI              = gokvm.CapX2APICAPI
	CapExitOnEmulationFailure = gokvm.CapExitOnEmulationFailure
	CapSetTSSAddr             = gokvm.CapSetTSSAddr
	CapSetIdentityMapAddr     = gokvm.CapSetIdentityMapAddr
)

// Flags of CapManualDirtyLogProtect2 (Documentation/virt/kvm/api.rst, 7.12).
const (
	// DirtyLogManualProtect: KVM_GET_DIRTY_LOG clears nothing, only
	// KVM_CLEAR_DIRTY_LOG does.
	DirtyLogManualProtect = 1 << 0
	// DirtyLogInitiallySet: when logging is turned on for a slot every page
	// counts as dirty, and pages are write-protected as they are cleared.
	DirtyLogInitiallySet = 1 << 1
)

// Flags of CapX2APICAPI.
const (
	// X2APICUse32BitIDs: APIC ids and interrupt destinations are 32 bits wide.
	X2APICUse32BitIDs = 1 << 0
	// X2APICDisableBroadcastQuirk: id 255 is a CPU, not a broadcast.
	X2APICDisableBroadcastQuirk = 1 << 1
)
