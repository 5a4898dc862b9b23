package kvm

import (
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// runUnion compares struct kvm_run: gokvm's struct of its beginning, and the offsets
// that are numbers in exit.go and exit_fatal.go.
func (l *layout) runUnion() {
	var r gokvm.RunData
	const u = unsafe.Offsetof(r.Data)
	l.at("kvm_run", "immediate_exit", unsafe.Offsetof(r.ImmediateExit))
	l.add("1 << (8 * offsetof(struct kvm_run, immediate_exit))", immediateExitBit)
	l.at("kvm_run", "exit_reason", unsafe.Offsetof(r.ExitReason))
	l.at("kvm_run", "cr8", unsafe.Offsetof(r.CR8))
	l.at("kvm_run", "apic_base", unsafe.Offsetof(r.ApicBase))
	l.at("kvm_run", "padding", u)
	l.add("sizeof(((struct kvm_run *)0)->padding)", unsafe.Sizeof(r.Data))
	// RunData.IO unpacks these from two words.
	l.at("kvm_run", "io.direction", u)
	l.at("kvm_run", "io.size", u+1)
	l.at("kvm_run", "io.port", u+2)
	l.at("kvm_run", "io.count", u+4)
	l.at("kvm_run", "io.data_offset", u+8)
	l.at("kvm_run", "mmio.phys_addr", u)
	l.at("kvm_run", "mmio.data", u+8)
	l.at("kvm_run", "mmio.len", u+16)
	l.at("kvm_run", "mmio.is_write", u+20)
	l.at("kvm_run", "hypercall.ret", u+56)
	l.at("kvm_run", "internal.suberror", u)
	l.at("kvm_run", "internal.ndata", u+4)
	l.at("kvm_run", "internal.data", u+8)
	l.at("kvm_run", "emulation_failure.flags", u+8)
	l.at("kvm_run", "emulation_failure.insn_size", u+16)
	l.at("kvm_run", "emulation_failure.insn_bytes", u+17)
	l.at("kvm_run", "fail_entry.hardware_entry_failure_reason", u)
	l.at("kvm_run", "fail_entry.cpu", u+8)
	l.at("kvm_run", "system_event.type", u)
	l.at("kvm_run", "system_event.ndata", u+4)
	l.at("kvm_run", "system_event.data", u+8)
	l.add("sizeof(((struct kvm_run *)0)->internal.data)", 16*8)
	l.add("sizeof(((struct kvm_run *)0)->system_event.data)", 16*8)
}

func (l *layout) requests() {
	for name, req := range map[string]uintptr{
		"KVM_GET_MSR_INDEX_LIST":     reqGetMSRIndexList,
		"KVM_GET_SUPPORTED_CPUID":    reqGetSupportedCPUID,
		"KVM_GET_DIRTY_LOG":          reqGetDirtyLog,
		"KVM_SET_USER_MEMORY_REGION": reqSetUserMemoryRegion,
		"KVM_SET_IDENTITY_MAP_ADDR":  reqSetIdentityMapAddr,
		"KVM_GET_IRQCHIP":            reqGetIRQChip,
		"KVM_SET_IRQCHIP":            reqSetIRQChip,
		"KVM_IRQ_LINE":               reqIRQLine,
		"KVM_SET_GSI_ROUTING":        reqSetGSIRouting,
		"KVM_IRQFD":                  reqIRQFD,
		"KVM_SIGNAL_MSI":             reqSignalMSI,
		"KVM_CREATE_PIT2":            reqCreatePIT2,
		"KVM_IOEVENTFD":              reqIOEventFD,
		"KVM_SET_CLOCK":              reqSetClock,
		"KVM_GET_CLOCK":              reqGetClock,
		"KVM_GET_PIT2":               reqGetPIT2,
		"KVM_SET_PIT2":               reqSetPIT2,
		"KVM_ENABLE_CAP":             reqEnableCap,
		"KVM_CLEAR_DIRTY_LOG":        reqClearDirtyLog,
		"KVM_RESET_DIRTY_RINGS":      reqResetDirtyRings,
		"KVM_RUN":                    reqRun,
		"KVM_GET_REGS":               reqGetRegs,
		"KVM_SET_REGS":               reqSetRegs,
		"KVM_GET_SREGS":              reqGetSregs,
		"KVM_SET_SREGS":              reqSetSregs,
		"KVM_TRANSLATE":              reqTranslate,
		"KVM_GET_MSRS":               reqGetMSRs,
		"KVM_SET_MSRS":               reqSetMSRs,
		"KVM_SET_SIGNAL_MASK":        reqSetSignalMask,
		"KVM_GET_LAPIC":              reqGetLAPIC,
		"KVM_SET_LAPIC":              reqSetLAPIC,
		"KVM_SET_CPUID2":             reqSetCPUID2,
		"KVM_GET_CPUID2":             reqGetCPUID2,
		"KVM_GET_MP_STATE":           reqGetMPState,
		"KVM_SET_MP_STATE":           reqSetMPState,
		"KVM_GET_VCPU_EVENTS":        reqGetVCPUEvents,
		"KVM_SET_VCPU_EVENTS":        reqSetVCPUEvents,
		"KVM_GET_DEBUGREGS":          reqGetDebugRegs,
		"KVM_SET_DEBUGREGS":          reqSetDebugRegs,
		"KVM_GET_XSAVE":              reqGetXSAVE,
		"KVM_SET_XSAVE":              reqSetXSAVE,
		"KVM_GET_XCRS":               reqGetXCRS,
		"KVM_SET_XCRS":               reqSetXCRS,
		"KVM_KVMCLOCK_CTRL":          reqKVMClockCtrl,
		"KVM_GET_SREGS2":             reqGetSregs2,
		"KVM_SET_SREGS2":             reqSetSregs2,
		"KVM_GET_XSAVE2":             reqGetXSAVE2,
		"KVM_SET_DEVICE_ATTR":        reqSetDeviceAttr,
		"KVM_GET_DEVICE_ATTR":        reqGetDeviceAttr,
		"KVM_HAS_DEVICE_ATTR":        reqHasDeviceAttr,
	} {
		l.add("(unsigned)"+name, req)
	}
}

func (l *layout) constants() {
	for name, value := range map[string]uintptr{
		"KVM_API_VERSION":                                     apiVersion,
		"KVM_CAP_MAX_VCPUS":                                   uintptr(CapMaxVCPUs),
		"KVM_CAP_IRQCHIP":                                     uintptr(CapIRQChip),
		"KVM_CAP_PIT2":                                        uintptr(CapPIT2),
		"KVM_CAP_PIT_STATE2":                                  uintptr(CapPITState2),
		"KVM_CAP_MP_STATE":                                    uintptr(CapMPState),
		"KVM_CAP_VCPU_EVENTS":                                 uintptr(CapVCPUEvents),
		"KVM_CAP_DEBUGREGS":                                   uintptr(CapDebugRegs),
		"KVM_CAP_XSAVE":                                       uintptr(CapXSAVE),
		"KVM_CAP_XSAVE2":                                      uintptr(gokvm.CapXSave2),
		"KVM_CAP_XCRS":                                        uintptr(CapXCRS),
		"KVM_CAP_SREGS2":                                      uintptr(CapSREGS2),
		"KVM_CAP_ADJUST_CLOCK":                                uintptr(CapAdjustClock),
		"KVM_CAP_TSC_CONTROL":                                 uintptr(CapTSCControl),
		"KVM_CAP_TSC_DEADLINE_TIMER":                          uintptr(CapTSCDeadlineTimer),
		"KVM_CAP_SYS_ATTRIBUTES":                              uintptr(gokvm.CapSysAttributes),
		"KVM_CAP_IMMEDIATE_EXIT":                              uintptr(CapImmediateExit),
		"KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2":                   uintptr(CapManualDirtyLogProtect2),
		"KVM_CAP_DIRTY_LOG_RING":                              uintptr(gokvm.CapDirtyLogRing),
		"KVM_CAP_DIRTY_LOG_RING_ACQ_REL":                      uintptr(gokvm.CapDirtyLogRingACQRel),
		"KVM_CAP_EXCEPTION_PAYLOAD":                           uintptr(CapExceptionPayload),
		"KVM_CAP_X86_TRIPLE_FAULT_EVENT":                      uintptr(CapX86TripleFaultEvent),
		"KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE":                 DirtyLogManualProtect,
		"KVM_DIRTY_LOG_INITIALLY_SET":                         DirtyLogInitiallySet,
		"KVM_DIRTY_LOG_PAGE_OFFSET":                           dirtyRingPage,
		"KVM_DIRTY_GFN_F_DIRTY":                               dirtyGFNDirty,
		"KVM_DIRTY_GFN_F_RESET":                               dirtyGFNReset,
		"KVM_MEM_LOG_DIRTY_PAGES":                             MemLogDirtyPages,
		"KVM_IRQCHIP_PIC_MASTER":                              uintptr(ChipPICMaster),
		"KVM_IRQCHIP_PIC_SLAVE":                               uintptr(ChipPICSlave),
		"KVM_IRQCHIP_IOAPIC":                                  uintptr(ChipIOAPIC),
		"KVM_IOAPIC_NUM_PINS":                                 IOAPICPins,
		"KVM_PIT_SPEAKER_DUMMY":                               PITSpeakerDummy,
		"KVM_IRQ_ROUTING_IRQCHIP":                             routeIRQChip,
		"KVM_IRQ_ROUTING_MSI":                                 routeMSI,
		"KVM_IRQFD_FLAG_DEASSIGN":                             IRQFDDeassign,
		"KVM_IOEVENTFD_FLAG_DEASSIGN":                         IOEventFDDeassign,
		"KVM_CLOCK_REALTIME":                                  uintptr(ClockRealtime),
		"KVM_CPUID_FLAG_SIGNIFCANT_INDEX":                     CPUIDSignificantIndex,
		"KVM_MP_STATE_UNINITIALIZED":                          uintptr(MPUninitialized),
		"KVM_MP_STATE_HALTED":                                 uintptr(MPHalted),
		"KVM_VCPUEVENT_VALID_SHADOW":                          EventShadow,
		"KVM_VCPUEVENT_VALID_PAYLOAD":                         EventPayload,
		"KVM_VCPUEVENT_VALID_TRIPLE_FAULT":                    EventTripleFault,
		"KVM_VCPU_TSC_CTRL":                                   vcpuTSCCtrl,
		"KVM_VCPU_TSC_OFFSET":                                 vcpuTSCOffset,
		"KVM_X86_XCOMP_GUEST_SUPP":                            xcompGuestSupp,
		"ARCH_GET_XCOMP_GUEST_PERM":                           archGetXCompGuestPerm,
		"ARCH_REQ_XCOMP_GUEST_PERM":                           archReqXCompGuestPerm,
		"KVM_INTERNAL_ERROR_EMULATION":                        InternalErrorEmulation,
		"KVM_INTERNAL_ERROR_SIMUL_EX":                         InternalErrorSimulEx,
		"KVM_INTERNAL_ERROR_DELIVERY_EV":                      InternalErrorDeliveryEv,
		"KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON":           InternalErrorUnexpectedExit,
		"KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES": emulationHasBytes,
		"KVM_SYSTEM_EVENT_SHUTDOWN":                           SystemEventShutdown,
		"KVM_SYSTEM_EVENT_RESET":                              SystemEventReset,
		"KVM_EXIT_IO_IN":                                      gokvm.EXITIOIN,
	} {
		l.add(name, value)
	}
	// The names are those of the kernel's constants.
	for reason, name := range exitNames {
		if reason != exitMemoryFault {
			l.add(name, uintptr(reason))
		}
	}
}
