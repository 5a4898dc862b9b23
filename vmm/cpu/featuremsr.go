package cpu

import (
	"errors"
	"fmt"
	"slices"

	"github.com/govmm/govmm/kvm"
)

const msrArchCapabilities = 0x10a

// featureMSRs describe the processor, as CPUID does: a guest reads them, and nothing that
// it does changes them (KVM_GET_MSR_FEATURE_INDEX_LIST, without VMX, and MSRs like those).
var featureMSRs = []struct {
	index uint32
	name  string
}{
	{0x8b, "UCODE_REV"},
	{0xce, "PLATFORM_INFO"},
	{0xcf, "CORE_CAPABILITIES"},
	{msrArchCapabilities, "ARCH_CAPABILITIES"},
	{0x345, "PERF_CAPABILITIES"},
	{0xc0011029, "DE_CFG"},
}

// archOptional are the bits of ARCH_CAPABILITIES that a destination may lack: RSBA and
// RRSBA name weaknesses, and SKIP_VMENTRY_L1DFLUSH is for guests that run guests.
const archOptional = 1<<2 | 1<<19 | 1<<3

// FeatureMSRs returns those of the MSRs that describe the processor to a guest with this
// CPUID, each once.
func FeatureMSRs(cpuid []kvm.CPUIDEntry, list []kvm.MSR) (out []kvm.MSR) {
	for _, f := range featureMSRs {
		i := slices.IndexFunc(list, func(m kvm.MSR) bool { return m.Index == f.index })
		if i >= 0 && shows(cpuid, f.index) {
			out = append(out, list[i])
		}
	}
	return out
}

// CheckFeatureMSRs lists why a new vCPU cannot have these values of the MSRs that describe
// the processor. It ignores all others, and leaves the vCPU as it is.
func CheckFeatureMSRs(v *kvm.VCPU, cpuid []kvm.CPUIDEntry, list []kvm.MSR) error {
	list = FeatureMSRs(cpuid, list)
	var indices []uint32
	for _, m := range list {
		indices = append(indices, m.Index)
	}
	fresh, err := ReadMSRs(v, indices)
	if err != nil {
		return err
	}
	lacks := lacksCapabilities(list, fresh)
	if lacks != nil { // one reason is enough
		list = slices.DeleteFunc(list, func(m kvm.MSR) bool { return m.Index == msrArchCapabilities })
	}
	return errors.Join(lacks, LoadMSRs(v, cpuid, indices, list), LoadMSRs(v, cpuid, indices, fresh))
}

// lacksCapabilities compares ARCH_CAPABILITIES: KVM takes any value of it, but a guest that
// knows that its processor is not vulnerable must not get to one that is.
func lacksCapabilities(guest, here []kvm.MSR) error {
	want, found := valueOf(guest, msrArchCapabilities), valueOf(here, msrArchCapabilities)
	if lacks := want &^ found &^ archOptional; lacks != 0 {
		return fmt.Errorf("MSR %s: expected %#x as in the guest, found %#x, which lacks %#x", msrName(msrArchCapabilities), want, found, lacks)
	}
	return nil
}

// valueOf is 0 for an MSR that is not in the list.
func valueOf(list []kvm.MSR, index uint32) uint64 {
	for _, m := range list {
		if m.Index == index {
			return m.Data
		}
	}
	return 0
}

// msrName is the number of an MSR, with its name if it is one of featureMSRs.
func msrName(index uint32) string {
	for _, f := range featureMSRs {
		if f.index == index {
			return fmt.Sprintf("%#x (%s)", index, f.name)
		}
	}
	return fmt.Sprintf("%#x", index)
}
