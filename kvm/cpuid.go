package kvm

import "unsafe"

// CPUIDEntry is one leaf, or subleaf, of CPUID: struct kvm_cpuid_entry2.
type CPUIDEntry struct {
	Function uint32 `cbor:"function"`
	Index    uint32 `cbor:"index"`
	Flags    uint32 `cbor:"flags"`
	Eax      uint32 `cbor:"eax"`
	Ebx      uint32 `cbor:"ebx"`
	Ecx      uint32 `cbor:"ecx"`
	Edx      uint32 `cbor:"edx"`
	_        [3]uint32
}

// CPUIDSignificantIndex is the flag of a [CPUIDEntry] whose Index matters.
const CPUIDSignificantIndex = 1 << 0

const (
	// maxCPUIDEntries is KVM_MAX_CPUID_ENTRIES (arch/x86/include/asm/kvm_host.h).
	maxCPUIDEntries = 256
	cpuidHeaderSize = 8
)

// cpuid2 is struct kvm_cpuid2 with the largest number of entries.
type cpuid2 struct {
	n       uint32
	_       uint32
	entries [maxCPUIDEntries]CPUIDEntry
}

// list returns a copy of the entries that the kernel has filled in.
func (c *cpuid2) list(op, what string) ([]CPUIDEntry, error) {
	if c.n > maxCPUIDEntries {
		return nil, opError(invalid("the kernel reports %d entries in a list of %d", c.n, maxCPUIDEntries), op, "%s", what)
	}
	return append([]CPUIDEntry(nil), c.entries[:c.n]...), nil
}

// SetCPUID2 sets the guest's CPUID. After the first KVM_RUN the kernel accepts only
// the same list again.
func (v *VCPU) SetCPUID2(entries []CPUIDEntry) error {
	const op = "KVM_SET_CPUID2"
	if len(entries) > maxCPUIDEntries {
		return opError(invalid("expected at most %d entries, got %d", maxCPUIDEntries, len(entries)), op, "vCPU %d", v.id)
	}
	c := &cpuid2{n: uint32(len(entries))}
	copy(c.entries[:], entries)
	_, err := v.h.ioctl(reqSetCPUID2, unsafe.Pointer(c))
	return opError(err, op, "vCPU %d, %d entries", v.id, len(entries))
}

// GetCPUID2 returns the list that was set, in which the bits that depend on the
// vCPU's state (OSXSAVE, APIC, XSAVE sizes) are current. A KVM that cannot
// intercept CPUID returns the processor's own leaves instead, so a saved machine
// includes the list that it has set.
func (v *VCPU) GetCPUID2() ([]CPUIDEntry, error) {
	c := &cpuid2{n: maxCPUIDEntries}
	if _, err := v.h.ioctl(reqGetCPUID2, unsafe.Pointer(c)); err != nil {
		return nil, opError(err, "KVM_GET_CPUID2", "vCPU %d", v.id)
	}
	return c.list("KVM_GET_CPUID2", v.what)
}
