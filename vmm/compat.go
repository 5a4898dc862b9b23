package vmm

import (
	"errors"
	"fmt"
	"math"

	"github.com/govmm/govmm/kvm"
)

// tscTolerance is by how much the frequency that a guest knows may differ from
// the host's when the TSC cannot be scaled: the kernel's own limit, 250 parts
// in a million (tsc_tolerance_ppm in arch/x86/kvm/x86.c).
const tscTolerance = 250

// incompatible lists everything for which the machine cannot run on this host,
// or nil. The spec is valid.
func (h *host) incompatible(s *Spec) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if s.CPUs > h.maxCPUs {
		bad("%d vCPUs: this host's KVM runs at most %d", s.CPUs, h.maxCPUs)
	}
	if free, err := h.available(s.Backing); err != nil {
		bad("find out how much memory is available: %w", err)
	} else if s.Memory > free {
		bad("memory of %d MiB (%s): this host has %d MiB available", s.Memory>>20, s.Backing, free>>20)
	}
	for _, n := range s.Needs {
		if err := h.lacks(n); err != nil {
			errs = append(errs, err)
		}
	}
	if s.TSCKHz != 0 && !h.tscControl && !sameFrequency(s.TSCKHz, h.tscKHz) {
		bad("TSC of %d kHz: this host's runs at %d kHz and its KVM cannot scale it (KVM_CAP_TSC_CONTROL)", s.TSCKHz, h.tscKHz)
	}
	errs = append(errs, h.cpuDiffers(s.CPUID)...)
	return errors.Join(errs...)
}

func sameFrequency(a, b uint64) bool {
	return a <= math.MaxUint32 && b <= math.MaxUint32 && max(a, b)-min(a, b) <= b*tscTolerance/1_000_000
}

// lacks looks for a capability by its number, which may be any.
func (h *host) lacks(number uint32) error {
	if number > math.MaxUint8 { // gokvm's type for it; there are some 250
		return fmt.Errorf("KVM capability %d is needed and not known here", number)
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

// cpuDiffers compares processors: the guest has seen what CPUID says and uses
// it.
func (h *host) cpuDiffers(want []kvm.CPUIDEntry) (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("CPU: "+format, args...)) }
	if w, g := vendorOf(want), vendorOf(h.cpuid); w != g {
		bad("the guest was started on %q, this host is %q", w, g)
	}
	for _, w := range featureWords {
		wanted := w.value(leafOf(want, w.function, w.index))
		if missing := wanted &^ w.value(leafOf(h.cpuid, w.function, w.index)); missing != 0 {
			bad("%v lacks %s", w, w.bitNames(missing))
		}
	}

	// The area that XSAVE writes has to be the same for the components in use.
	components := leafOf(want, leafXState, 0)
	for i := uint32(2); i < 63; i++ {
		if mask := uint64(components.Edx)<<32 | uint64(components.Eax); mask&(1<<i) == 0 {
			continue
		}
		w, g := leafOf(want, leafXState, i), leafOf(h.cpuid, leafXState, i)
		if w.Eax != g.Eax || w.Ebx != g.Ebx {
			bad("XSAVE component %d has %d bytes at offset %d, here %d at %d", i, w.Eax, w.Ebx, g.Eax, g.Ebx)
		}
	}
	if w, g := leafOf(want, leafAMDSizes, 0).Eax, leafOf(h.cpuid, leafAMDSizes, 0).Eax; w&0xff > g&0xff {
		bad("physical addresses of %d bits, here %d", w&0xff, g&0xff)
	}
	const version, geometry = 0xff, 0xffffff // EAX: version, counters, their width
	if w, g := leafOf(want, leafCounters, 0), leafOf(h.cpuid, leafCounters, 0); w.Eax&version != 0 &&
		(w.Eax&geometry != g.Eax&geometry || w.Edx&0x1fff != g.Edx&0x1fff) {
		bad("performance counters differ (CPUID 0xa: %#x and %#x, here %#x and %#x)", w.Eax, w.Edx, g.Eax, g.Edx)
	}
	return errs
}
