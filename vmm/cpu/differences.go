package cpu

import (
	"fmt"

	"github.com/govmm/govmm/kvm"
)

// Differences lists why a guest whose processor is want cannot run on a host that
// gives its guests the processor here: the guest has read its CPUID and relies on
// it. It returns nil if the guest can.
func Differences(want, here []kvm.CPUIDEntry) (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("CPU: "+format, args...)) }
	if w, g := vendorOf(want), vendorOf(here); w != g {
		bad("the guest was started on %q, this host is %q", w, g)
	}
	for _, w := range featureWords {
		wanted := w.value(leafOf(want, w.function, w.index))
		if missing := wanted &^ w.value(leafOf(here, w.function, w.index)); missing != 0 {
			bad("%v lacks %s", w, w.bitNames(missing))
		}
	}

	// KVM has interfaces of other hypervisors, which the leaves of a guest turn on.
	for _, w := range want {
		g, ok := entryOf(here, w.Function)
		if w.Function>>28 == leafKVM>>28 && (!ok || w.Function == leafKVM && (w.Ebx != g.Ebx || w.Ecx != g.Ecx || w.Edx != g.Edx)) {
			bad("the guest has leaf %#x of a hypervisor (%#x, %#x, %#x, %#x), which is none of KVM's here", w.Function, w.Eax, w.Ebx, w.Ecx, w.Edx)
		}
	}

	// The area that XSAVE writes has to be the same for the components in use.
	components := leafOf(want, leafXState, 0)
	for i := uint32(2); i < 63; i++ {
		if mask := uint64(components.Edx)<<32 | uint64(components.Eax); mask&(1<<i) == 0 {
			continue
		}
		w, g := leafOf(want, leafXState, i), leafOf(here, leafXState, i)
		if w.Eax != g.Eax || w.Ebx != g.Ebx {
			bad("XSAVE component %d has %d bytes at offset %d, here %d at %d", i, w.Eax, w.Ebx, g.Eax, g.Ebx)
		}
	}
	if w, g := leafOf(want, leafAMDSizes, 0).Eax, leafOf(here, leafAMDSizes, 0).Eax; w&0xff > g&0xff {
		bad("physical addresses of %d bits, here %d", w&0xff, g&0xff)
	}
	const version, geometry = 0xff, 0xffffff // EAX: version, counters, their width
	if w, g := leafOf(want, leafCounters, 0), leafOf(here, leafCounters, 0); w.Eax&version != 0 &&
		(w.Eax&geometry != g.Eax&geometry || w.Edx&0x1fff != g.Edx&0x1fff) {
		bad("performance counters differ (CPUID 0xa: %#x and %#x, here %#x and %#x)", w.Eax, w.Edx, g.Eax, g.Edx)
	}
	return errs
}

// entryOf returns the first entry of a leaf.
func entryOf(list []kvm.CPUIDEntry, function uint32) (kvm.CPUIDEntry, bool) {
	for _, e := range list {
		if e.Function == function {
			return e, true
		}
	}
	return kvm.CPUIDEntry{}, false
}
