package machine

import (
	"fmt"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/cpu"
)

// vcpuState is all of a vCPU except what it was made with.
type vcpuState struct {
	ID      uint32      `cbor:"id"`
	MPState kvm.MPState `cbor:"mp_state"`
	Regs    kvm.Regs    `cbor:"regs"`
	// Sregs2 is used where the kernel has it, otherwise Sregs; the other is nil.
	Sregs2    *kvm.Sregs2    `cbor:"sregs2"`
	Sregs     *kvm.Sregs     `cbor:"sregs"`
	XSAVE     []byte         `cbor:"xsave"`
	XCRS      kvm.XCRS       `cbor:"xcrs"`
	DebugRegs kvm.DebugRegs  `cbor:"debug_regs"`
	LAPIC     kvm.LAPICState `cbor:"lapic"`
	MSRs      []kvm.MSR      `cbor:"msrs"`
	// TSCOffset is nil on kernels that do not tell.
	TSCOffset *uint64        `cbor:"tsc_offset"`
	Events    kvm.VCPUEvents `cbor:"events"`
}

// saveVCPU reads a vCPU that stands still, in the order that [Machine.saveState]
// explains.
func (m *Machine) saveVCPU(v *kvm.VCPU) (s vcpuState, err error) {
	s.ID = uint32(v.ID())
	if s.MPState, err = v.GetMPState(); err != nil {
		return s, err
	}
	if s.Regs, err = v.GetRegs(); err != nil {
		return s, err
	}
	if m.kernel.caps.sregs2 {
		sregs, err := v.GetSregs2()
		if err != nil {
			return s, err
		}
		s.Sregs2 = &sregs
	} else {
		sregs, err := v.GetSregs()
		if err != nil {
			return s, err
		}
		s.Sregs = &sregs
	}
	if s.XSAVE, err = v.GetXSAVE(); err != nil {
		return s, err
	}
	if s.XCRS, err = v.GetXCRS(); err != nil {
		return s, err
	}
	if s.DebugRegs, err = v.GetDebugRegs(); err != nil {
		return s, err
	}
	if s.LAPIC, err = v.GetLAPIC(); err != nil {
		return s, err
	}
	if s.MSRs, err = cpu.ReadMSRs(v, m.kernel.msrs); err != nil {
		return s, err
	}
	if s.TSCOffset, err = tscOffset(v); err != nil {
		return s, err
	}
	s.Events, err = v.GetVCPUEvents()
	return s, err
}

// loadRegisters loads the first half of a vCPU. SREGS before all: the mode of
// the processor and the APIC's base decide what other values are valid. XCRS
// before XSAVE: XCR0 says which components may be loaded.
func (m *Machine) loadRegisters(v *kvm.VCPU, s *vcpuState) error {
	switch {
	case s.Sregs2 != nil && m.kernel.caps.sregs2:
		if err := v.SetSregs2(*s.Sregs2); err != nil {
			return err
		}
	case s.Sregs != nil:
		if err := v.SetSregs(*s.Sregs); err != nil {
			return err
		}
	default:
		return fmt.Errorf("machine state: vCPU %d has no segments that this kernel can load", v.ID())
	}
	if err := v.SetRegs(s.Regs); err != nil {
		return err
	}
	if err := v.SetXCRS(s.XCRS); err != nil {
		return err
	}
	if err := v.SetXSAVE(cpu.HideXSAVE(s.XSAVE, m.spec.CPUID, s.XCRS)); err != nil {
		return err
	}
	return v.SetDebugRegs(s.DebugRegs)
}

// loadRest loads the second half, when the clocks go. The LAPIC before the
// MSRs, because a TSC deadline is ignored as long as LVTT does not ask for
// one. The events after everything that could bring up one of its own, and
// MP_STATE last: a vCPU that waits for SIPI takes nothing else.
func (m *Machine) loadRest(v *kvm.VCPU, s *vcpuState) error {
	if err := v.SetLAPIC(s.LAPIC); err != nil {
		return err
	}
	if err := cpu.LoadMSRs(v, m.spec.CPUID, m.kernel.msrs, s.MSRs); err != nil {
		return err
	}
	events, err := m.events(s)
	if err != nil {
		return err
	}
	if err := v.SetVCPUEvents(events); err != nil {
		return err
	}
	return v.SetMPState(s.MPState)
}

// events adapts the events to a kernel that does not have all of them. That is an
// error only if such an event is pending.
func (m *Machine) events(s *vcpuState) (kvm.VCPUEvents, error) {
	e := s.Events
	if e.Flags&kvm.EventTripleFault != 0 && !m.kernel.caps.tripleFault {
		if e.TripleFault != 0 {
			return e, fmt.Errorf("machine state: vCPU %d has a triple fault pending, which this host's KVM cannot load", s.ID)
		}
		e.Flags &^= kvm.EventTripleFault
	}
	if e.Flags&kvm.EventPayload != 0 && !m.kernel.caps.exceptionPayload {
		if e.Exception.Pending != 0 || e.ExceptionHasPayload != 0 {
			return e, fmt.Errorf("machine state: vCPU %d has an exception with a payload pending, which this host's KVM cannot load", s.ID)
		}
		e.Flags &^= kvm.EventPayload
	}
	return e, nil
}
