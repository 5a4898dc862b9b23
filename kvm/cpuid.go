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

// cpuid2 is struct kvm_cpuid2 with room for as many entries as the kernel has.
type cpuid2 struct {
	n       uint32
	_       uint32
	entries [maxCPUIDEntries]CPUIDEntry
}

// list copies out what the kernel filled in.
func (c *cpuid2) list(op, what string) ([]CPUIDEntry, error) {
	if c.n > maxCPUIDEntries {
		return nil, opError(invalid("%d entries in a list of %d", c.n, maxCPUIDEntries), op, "%s", what)
	}
	return append([]CPUIDEntry(nil), c.entries[:c.n]...), nil
}

// SetCPUID2 sets what CPUID answers in the guest. The kernel allows it before
// the first KVM_RUN; afterwards only the same list again.
func (v *VCPU) SetCPUID2(entries []CPUIDEntry) error {
	const op = "KVM_SET_CPUID2"
	if len(entries) > maxCPUIDEntries {
		return opError(invalid("%d entries, at most %d", len(entries), maxCPUIDEntries), op, "vCPU %d", v.id)
	}
	c := &cpuid2{n: uint32(len(entries))}
	copy(c.entries[:], entries)
	_, err := v.h.ioctl(reqSetCPUID2, unsafe.Pointer(c))
	return opError(err, op, "vCPU %d, %d entries", v.id, len(entries))
}

// GetCPUID2 returns the list that was set, with the bits that follow the
// vCPU's state (OSXSAVE, APIC, XSAVE sizes) as they are now. A KVM that cannot
// intercept CPUID answers with the processor's own leaves instead, so a saved
// machine carries the list that it set.
func (v *VCPU) GetCPUID2() ([]CPUIDEntry, error) {
	c := &cpuid2{n: maxCPUIDEntries}
	if _, err := v.h.ioctl(reqGetCPUID2, unsafe.Pointer(c)); err != nil {
		return nil, opError(err, "KVM_GET_CPUID2", "vCPU %d", v.id)
	}
	return c.list("KVM_GET_CPUID2", v.what)
}
