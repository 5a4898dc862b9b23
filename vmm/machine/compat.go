package machine

import (
	"errors"
	"fmt"
	"math"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/cpu"
)

// tscTolerance is by how much the frequency that a guest knows may differ from
// the host's when the TSC cannot be scaled: the kernel's own limit, 250 parts
// in a million (tsc_tolerance_ppm in arch/x86/kvm/x86.c).
const tscTolerance = 250

// incompatible lists every reason why the machine cannot run on this host; nil if it
// can. The spec is valid.
func (h *host) incompatible(s *Spec) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, kind.Told(fmt.Errorf(format, args...))) }

	if s.CPUs > h.maxCPUs {
		bad("%d vCPUs: this host's KVM runs at most %d", s.CPUs, h.maxCPUs)
	}
	if err := h.admit(s.Memory, s.Backing, s.Overcommit); err != nil && !s.inherited {
		errs = append(errs, kind.Hidden(err, "memory of %d MiB (%s): this host has too little", s.Memory>>20, s.Backing))
	}
	for _, n := range s.Needs {
		errs = append(errs, kind.Told(h.lacks(n)))
	}
	errs = append(errs, kind.Told(h.fitsTSC(s)))
	for _, err := range cpu.Differences(s.CPUID, h.cpuid) {
		errs = append(errs, kind.Told(err))
	}
	return errors.Join(errs...)
}

// fitsTSC reports whether the guest's TSC can run at its frequency here.
func (h *host) fitsTSC(s *Spec) error {
	if s.TSCKHz == 0 || h.tscControl || sameFrequency(s.TSCKHz, h.tscKHz) {
		return nil
	}
	return fmt.Errorf("TSC of %d kHz: this host's runs at %d kHz and its KVM cannot scale it (KVM_CAP_TSC_CONTROL)", s.TSCKHz, h.tscKHz)
}

func sameFrequency(a, b uint64) bool {
	return a <= math.MaxUint32 && b <= math.MaxUint32 && max(a, b)-min(a, b) <= b*tscTolerance/1_000_000
}

// lacks reports whether KVM lacks a capability; its number comes from a peer.
func (h *host) lacks(number uint32) error {
	if number > math.MaxUint8 { // gokvm's type for it; there are some 250
		return fmt.Errorf("KVM capability %d is needed, and this govmm does not know it", number)
	}
	c := kvm.Capability(number)
	n, err := h.capability(c)
	if err != nil {
		return fmt.Errorf("ask for KVM capability %d (%v): %w", number, c, err)
	}
	if n == 0 {
		return fmt.Errorf("this host's KVM lacks capability %d (%v)", number, c)
	}
	return nil
}
