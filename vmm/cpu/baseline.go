package cpu

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"strings"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/memory"
)

// Host is the name of the model that stands for this host's processor.
const Host = "host"

// Models returns the names of the processor models: the host's processor, and
// baselines that a mixed fleet can share, named after the levels of the x86-64
// psABI (System V ABI, AMD64 supplement, table 3.1).
func Models() []string { return []string{Host, "x86-64-v2", "x86-64-v3"} }

// baseline is a processor made only of what a level has and a guest of KVM needs.
// So it is the same on every host of a vendor, except for what features copies.
type baseline struct {
	name string
	avx  bool // level 3
	// physical is how many bits a physical address has on the smallest
	// processors of the level.
	physical uint32
}

// baselineOf returns the baseline of a name, nil for the host's processor.
func baselineOf(name string) (*baseline, error) {
	switch name {
	case "", Host:
		return nil, nil
	case "x86-64-v2":
		return &baseline{name: name, physical: 36}, nil
	case "x86-64-v3":
		return &baseline{name: name, avx: true, physical: 39}, nil
	}
	return nil, fmt.Errorf("CPU %.40q: must be one of %s", name, strings.Join(Models(), ", "))
}

// Guest returns the CPUID leaves of a guest on this host, without what differs
// between its vCPUs (see [ForVCPU]). model is one of [Models], "" is [Host]; size
// is the guest's memory in bytes. The error names what the host lacks.
func Guest(sys *kvm.System, model string, size uint64) ([]kvm.CPUIDEntry, error) {
	b, err := baselineOf(model)
	if err != nil {
		return nil, err
	}
	host, err := Supported(sys)
	if err != nil || b == nil {
		return host, err
	}
	return b.cpuid(host, size)
}

// Features of level 1 and of 64 bits, CPUID 1 EDX; all processors have them.
const (
	edx1Base = 1<<0 | 1<<3 | 1<<4 | 1<<5 | 1<<6 | 1<<8 | 1<<9 | 1<<13 | // fpu, pse, tsc, msr, pae, cx8, apic, pge
		1<<15 | 1<<16 | 1<<19 | 1<<23 | 1<<24 | 1<<25 | 1<<26 // cmov, pat, clflush, mmx, fxsr, sse, sse2
	// edx1More are features that some KVMs do not offer and no kernel requires.
	edx1More   = 1<<1 | 1<<2 | 1<<7 | 1<<11 | 1<<12 | 1<<14 | 1<<17 // vme, de, mce, sep, mtrr, mca, pse36
	amdEDXBase = 1<<11 | 1<<20 | 1<<29                              // syscall, nx, lm: 0x80000001 EDX
	amdEDXCopy = 0x0183f3ff                                         // the bits of leaf 1 that AMD has there, too
)

// Features of levels 2 and 3, by their registers.
const (
	ecx1V2    = 1<<0 | 1<<9 | 1<<13 | 1<<19 | 1<<20 | 1<<23 // sse3, ssse3, cx16, sse4_1, sse4_2, popcnt
	amdECXV2  = 1 << 0                                      // lahf_lm
	ecx1V3    = 1<<12 | 1<<22 | 1<<26 | 1<<28 | 1<<29       // fma, movbe, xsave, avx, f16c
	ebx7V3    = 1<<3 | 1<<5 | 1<<8                          // bmi1, avx2, bmi2
	amdECXV3  = 1 << 5                                      // lzcnt, which Linux calls abm
	xstateAVX = 7                                           // x87, SSE, AVX
)

// What a guest of KVM needs besides; KVM provides it on any processor.
const (
	ecx1KVM      = 1<<21 | ecx1TSCDeadline | ecx1Hypervisor // x2apic
	eax6ARAT     = 1 << 2                                   // the APIC's timer never stops
	invariantTSC = 1 << 8                                   // the TSC runs at one rate
	// kvmBase are the clocks, older than Linux 3.
	kvmBase = 1<<0 | 1<<3 | 1<<24 // kvmclock, kvmclock2, kvmclock_stable
	// kvmMore save exits; all hosts with Linux 5.3 or later have them:
	// nopiodelay, steal_time, pv_eoi, pv_unhalt, pv_tlb_flush, pv_ipi, pv_sched_yield.
	kvmMore = 1<<1 | 1<<5 | 1<<6 | 1<<7 | 1<<9 | 1<<11 | 1<<13
)

// signature is CPUID 1 EAX, which identifies the processor: of each vendor one of
// the first with the level. It is old on purpose. A guest chooses its mitigations
// by it, and must not leave out one that some host of the fleet needs.
func (b *baseline) signature(vendor string) (uint32, error) {
	switch {
	case vendor == "GenuineIntel" && !b.avx:
		return 0x000106a5, nil // family 6, model 0x1a, stepping 5: Nehalem
	case vendor == "GenuineIntel":
		return 0x000306c3, nil // family 6, model 0x3c, stepping 3: Haswell
	case vendor == "AuthenticAMD":
		return 0x00800f12, nil // family 0x17, model 1, stepping 2: Zen
	case vendor == "HygonGenuine":
		return 0x00900f02, nil // family 0x18, model 0, stepping 2: Dhyana, a Zen
	}
	return 0, fmt.Errorf("CPU %s: this host's processor is %q; baselines exist for processors of Intel, AMD and Hygon", b.name, vendor)
}

// cpuid returns the baseline's leaves for a guest with size bytes of memory, on a
// host with the leaves that guestCPUID returned. The error names what the host
// lacks.
func (b *baseline) cpuid(host []kvm.CPUIDEntry, size uint64) ([]kvm.CPUIDEntry, error) {
	vendor := vendorOf(host)
	sig, err := b.signature(vendor)
	if err != nil {
		return nil, err
	}
	out := b.features(host, sig)
	missing := lacking(out, host)
	if need, here := b.physicalBits(size), leafOf(host, leafAMDSizes, 0).Eax&0xff; need > here {
		missing = append(missing, fmt.Sprintf("physical addresses of %d bits (CPUID 0x80000008 EAX: %d)", need, here))
	}
	if missing != nil {
		return nil, fmt.Errorf("CPU %s: this host lacks %s", b.name, strings.Join(missing, "; "))
	}
	return append(out, b.frame(host, size)...), nil
}

// features returns the leaves that have feature bits. A few bits are copied from
// the host: only very old kernels lack them.
func (b *baseline) features(host []kvm.CPUIDEntry, sig uint32) []kvm.CPUIDEntry {
	const line = 64 / 8 << 8 // bytes that CLFLUSH flushes
	one := kvm.CPUIDEntry{Function: leafFeatures, Eax: sig, Ebx: line, Ecx: ecx1V2 | ecx1KVM,
		Edx: edx1Base | edx1More&leafOf(host, leafFeatures, 0).Edx}
	seven := subleaf(leafExtended, 0, 0, 0, 0, 0)
	ext := kvm.CPUIDEntry{Function: leafAMDFeatures, Ecx: amdECXV2, Edx: amdEDXBase}
	if isAMD(host) {
		ext.Eax = sig
		ext.Edx |= one.Edx & amdEDXCopy & leafOf(host, leafAMDFeatures, 0).Edx
	}
	if b.avx {
		one.Ecx |= ecx1V3
		seven.Ebx |= ebx7V3
		ext.Ecx |= amdECXV3
	}
	out := []kvm.CPUIDEntry{one, seven, ext,
		{Function: leafPower, Eax: eax6ARAT & leafOf(host, leafPower, 0).Eax},
		{Function: leafKVMFeatures, Eax: kvmBase | kvmMore&leafOf(host, leafKVMFeatures, 0).Eax},
		{Function: leafAMDPower, Edx: invariantTSC & leafOf(host, leafAMDPower, 0).Edx},
	}
	if b.avx {
		// Sizes follow from the architecture: 512 bytes, the header, 256 for AVX.
		const legacy, avx = 512 + 64, 256
		out = append(out, subleaf(leafXState, 0, xstateAVX, legacy+avx, legacy+avx, 0),
			subleaf(leafXState, 1, 0, 0, 0, 0), subleaf(leafXState, 2, avx, legacy, 0, 0))
	}
	return out
}

// lacking names the features of want that the host does not have.
func lacking(want, host []kvm.CPUIDEntry) (missing []string) {
	for _, w := range featureWords {
		if lost := w.value(leafOf(want, w.function, w.index)) &^ w.value(leafOf(host, w.function, w.index)); lost != 0 {
			missing = append(missing, fmt.Sprintf("%s (%v)", w.bitNames(lost), w))
		}
	}
	return missing
}

// frame returns the leaves that describe the processor, except for features. The
// caches are invented: guests choose how to copy memory by them, and nothing else
// depends on them.
func (b *baseline) frame(host []kvm.CPUIDEntry, size uint64) []kvm.CPUIDEntry {
	vendor := leafOf(host, leafVendor, 0)
	vendor.Eax = leafTopology
	if b.avx {
		vendor.Eax = leafXState
	}
	highest := kvm.CPUIDEntry{Function: leafExtendedMax, Eax: leafAMDSizes}
	l2 := kvm.CPUIDEntry{Function: leafAMDCaches2, Ecx: 256<<16 | 6<<12 | 64} // 256 KiB, 8 ways
	var caches []kvm.CPUIDEntry
	if isAMD(host) {
		highest.Ebx, highest.Ecx, highest.Edx = vendor.Ebx, vendor.Ecx, vendor.Edx
		const l1 = 32<<24 | 8<<16 | 1<<8 | 64 // 32 KiB each, 8 ways
		caches = []kvm.CPUIDEntry{{Function: leafAMDCaches1, Ecx: l1, Edx: l1}}
		l2.Edx = 16<<18 | 8<<12 | 1<<8 | 64 // third level: 16 times 512 KiB, 16 ways
	} else {
		const data, code, unified = 1, 2, 3
		caches = []kvm.CPUIDEntry{
			{Function: leafDescriptors, Eax: 0x00feff01, Ebx: 0xf0}, // see leaf 4; prefetching is 64 bytes
			cache(0, data, 1, 8, 64), cache(1, code, 1, 8, 64), cache(2, unified, 2, 8, 512),
			cache(3, unified, 3, 16, 8192), subleaf(leafCaches, 4, 0, 0, 0, 0),
		}
	}
	out := append(caches, vendor, highest, l2,
		subleaf(leafTopology, 0, 0, 0, 0, 0), // cpuidOf fills it in
		kvm.CPUIDEntry{Function: leafKVM, Eax: leafKVMFeatures, Ebx: 0x4b4d564b, Ecx: 0x564b4d56, Edx: 0x4d}, // KVMKVMKVM
		kvm.CPUIDEntry{Function: leafAMDSizes, Eax: linearBits<<8 | b.physicalBits(size)})
	return append(out, b.brand()...)
}

// brand returns the processor's name, 48 bytes.
func (b *baseline) brand() (out []kvm.CPUIDEntry) {
	var name [48]byte
	copy(name[:], "govmm "+b.name)
	for i := range uint32(3) {
		p := name[16*i:]
		le := binary.LittleEndian
		out = append(out, kvm.CPUIDEntry{Function: leafBrand + i, Eax: le.Uint32(p), Ebx: le.Uint32(p[4:]), Ecx: le.Uint32(p[8:]), Edx: le.Uint32(p[12:])})
	}
	return out
}

// cache is a subleaf of leaf 4: lines of 64 bytes.
func cache(index, kind, level, ways, sets uint32) kvm.CPUIDEntry {
	const selfInitializing = 1 << 8
	return subleaf(leafCaches, index, kind|level<<5|selfInitializing, (ways-1)<<22|(64-1), sets-1, 0)
}

func subleaf(function, index, eax, ebx, ecx, edx uint32) kvm.CPUIDEntry {
	return kvm.CPUIDEntry{Function: function, Index: index, Flags: kvm.CPUIDSignificantIndex, Eax: eax, Ebx: ebx, Ecx: ecx, Edx: edx}
}

const linearBits = 48

// physicalBits is the width of a guest's physical addresses: enough for its memory,
// and at least what every host of the level has.
func (b *baseline) physicalBits(size uint64) uint32 {
	end := size
	if size > memory.HoleStart {
		end += memory.HoleEnd - memory.HoleStart
	}
	return max(b.physical, uint32(bits.Len64(end-1)))
}
