package kvm

import gokvm "github.com/bobuhiro11/gokvm/kvm"

// Requests returns the numbers of all ioctls that this package makes, KVM_RUN first: for
// a filter of system calls (seccomp(2)).
func Requests() []uint32 {
	all := []uintptr{reqRun,
		// By gokvm, which does not export them: KVM_GET_API_VERSION, KVM_CREATE_VM,
		// KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, KVM_SET_TSS_ADDR,
		// KVM_CREATE_IRQCHIP, KVM_SET_TSC_KHZ and KVM_GET_TSC_KHZ.
		gokvm.IIO(0x00), gokvm.IIO(0x01), gokvm.IIO(0x03), gokvm.IIO(0x04), gokvm.IIO(0x41), gokvm.IIO(0x47), gokvm.IIO(0x60), gokvm.IIO(0xa2), gokvm.IIO(0xa3),
		reqGetMSRIndexList, reqGetSupportedCPUID,
		reqGetDirtyLog, reqSetUserMemoryRegion, reqSetIdentityMapAddr, reqGetIRQChip, reqSetIRQChip, reqIRQLine, reqSetGSIRouting, reqIRQFD, reqSignalMSI,
		reqCreatePIT2, reqIOEventFD, reqSetClock, reqGetClock, reqGetPIT2, reqSetPIT2, reqEnableCap, reqClearDirtyLog, reqResetDirtyRings,
		reqGetRegs, reqSetRegs, reqGetSregs, reqSetSregs, reqTranslate, reqGetMSRs, reqSetMSRs, reqSetSignalMask, reqGetLAPIC, reqSetLAPIC,
		reqSetCPUID2, reqGetCPUID2, reqGetMPState, reqSetMPState, reqGetVCPUEvents, reqSetVCPUEvents, reqGetDebugRegs, reqSetDebugRegs,
		reqGetXSAVE, reqSetXSAVE, reqGetXCRS, reqSetXCRS, reqKVMClockCtrl, reqGetSregs2, reqSetSregs2, reqGetXSAVE2,
		reqSetDeviceAttr, reqGetDeviceAttr, reqHasDeviceAttr}
	list := make([]uint32, len(all))
	for i, r := range all {
		list[i] = uint32(r)
	}
	return list
}
