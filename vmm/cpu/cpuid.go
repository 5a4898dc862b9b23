package cpu

import (
	"math/bits"
	"slices"

	"github.com/govmm/govmm/kvm"
)

// CPUID leaves that this package reads (Intel SDM volume 2, CPUID; AMD APM volume 3,
// appendix E; Documentation/virt/kvm/x86/cpuid.rst).
const (
	leafVendor       = 0x0
	leafFeatures     = 0x1
	leafDescriptors  = 0x2
	leafCaches       = 0x4
	leafPower        = 0x6
	leafExtended     = 0x7
	leafCounters     = 0xa
	leafTopology     = 0xb
	leafXState       = 0xd
	leafSGX          = 0x12
	leafTiles        = 0x1d
	leafTileMultiply = 0x1e
	leafTopologyV2   = 0x1f
	leafKVM          = 0x40000000
	leafKVMFeatures  = 0x40000001
	leafExtendedMax  = 0x80000000
	leafAMDFeatures  = 0x80000001
	leafBrand        = 0x80000002 // to 0x80000004
	leafAMDCaches1   = 0x80000005
	leafAMDCaches2   = 0x80000006
	leafAMDPower     = 0x80000007
	leafAMDSizes     = 0x80000008
	leafSVM          = 0x8000000a
	leafAMDCaches    = 0x8000001d
	leafAMDTopology  = 0x8000001e
	leafAMDFeatures2 = 0x80000021
	leafAMDTopology2 = 0x80000026
)

// Bits that are changed.
const (
	ecx1Monitor     = 1 << 3
	ecx1VMX         = 1 << 5
	ecx1TSCDeadline = 1 << 24
	ecx1OSXSAVE     = 1 << 27 // follows CR4
	ecx1Hypervisor  = 1 << 31
	edx1HTT         = 1 << 28
	ebx7SGX         = 1 << 2
	ecx7OSPKE       = 1 << 4 // follows CR4
	ecx7SGXLC       = 1 << 30
	edx7AMX         = 1<<22 | 1<<24 | 1<<25 // AMX_BF16, AMX_TILE, AMX_INT8
	eax71AMX        = 1 << 21               // AMX_FP16
	edx71AMX        = 1 << 8                // AMX_COMPLEX
	amdSVM          = 1 << 2
	amdCmpLegacy    = 1 << 1
)

// xstateTiles is the XSAVE component of AMX's tiles.
const xstateTiles = 18

// Supported returns the processor that a guest gets on this host: what KVM
// supports, without what cannot be migrated.
func Supported(sys *kvm.System) ([]kvm.CPUIDEntry, error) {
	xcomp, err := sys.RequestXComp()
	if err != nil {
		xcomp = 0 // no AMX then
	}
	supported, err := sys.SupportedCPUID()
	if err != nil {
		return nil, err
	}
	deadline, err := sys.CheckExtension(kvm.CapTSCDeadlineTimer)
	if err != nil {
		return nil, err
	}
	return guestCPUID(supported, deadline > 0, xcomp), nil
}

// guestCPUID makes a guest's processor from what KVM supports on this host. It adds
// the hypervisor bit, keeps KVM's own leaves, and masks what cannot be migrated:
// VMX and SVM (nested state does not travel), SGX (enclaves do not either), and AMX
// where this process has no permission for its state (xcomp).
func guestCPUID(supported []kvm.CPUIDEntry, tscDeadline bool, xcomp uint64) []kvm.CPUIDEntry {
	amx := xcomp&(1<<xstateTiles) != 0
	var out []kvm.CPUIDEntry
	for _, e := range supported {
		switch e.Function {
		case leafFeatures:
			e.Ecx = e.Ecx&^(ecx1Monitor|ecx1VMX|ecx1OSXSAVE) | ecx1Hypervisor
			if tscDeadline { // KVM reports it by a capability
				e.Ecx |= ecx1TSCDeadline
			}
		case leafExtended:
			switch e.Index {
			case 0:
				e.Ebx &^= ebx7SGX
				e.Ecx &^= ecx7OSPKE | ecx7SGXLC
				if !amx {
					e.Edx &^= edx7AMX
				}
			case 1:
				if !amx {
					e.Eax &^= eax71AMX
					e.Edx &^= edx71AMX
				}
			}
		case leafTiles, leafTileMultiply:
			if !amx {
				continue
			}
		case leafAMDFeatures:
			e.Ecx &^= amdSVM
		case leafSGX, leafSVM, leafAMDTopology2:
			continue
		}
		out = append(out, e)
	}
	return out
}

// ForVCPU returns the leaves of one vCPU: those of the guest's processor (base), with
// the vCPU's APIC id, which is its number, in every place where CPUID has it. The
// machine is one package with a core for each vCPU, one thread each; the cores
// share the third-level cache.
func ForVCPU(base []kvm.CPUIDEntry, id, cpus int) []kvm.CPUIDEntry {
	idBits := uint32(bits.Len(uint(cpus - 1)))
	room := uint32(1) << idBits // APIC ids of the package
	amd := isAMD(base)
	out := make([]kvm.CPUIDEntry, 0, len(base)+4)
	for _, e := range base {
		switch e.Function {
		case leafFeatures:
			e.Ebx = e.Ebx&0xffff | min(room, 255)<<16 | uint32(id)<<24
			e.Edx &^= edx1HTT
			if cpus > 1 {
				e.Edx |= edx1HTT
			}
		case leafCaches:
			if e.Eax&0x1f != 0 { // there is such a cache
				e.Eax = e.Eax&0x3fff | sharers(e.Eax, room)<<14 | min(room-1, 63)<<26
			}
		case leafAMDCaches:
			if e.Eax&0x1f != 0 {
				e.Eax = e.Eax&0x3fff | sharers(e.Eax, room)<<14
			}
		case leafTopology, leafTopologyV2:
			continue
		case leafAMDFeatures:
			e.Ecx &^= amdCmpLegacy
			if amd && cpus > 1 {
				e.Ecx |= amdCmpLegacy
			}
		case leafAMDSizes:
			if amd {
				e.Ecx = uint32(cpus-1) | idBits<<12
			}
		case leafAMDTopology:
			e.Eax, e.Ebx, e.Ecx, e.Edx = uint32(id), uint32(id), 0, 0
		}
		out = append(out, e)
	}
	for _, leaf := range []uint32{leafTopology, leafTopologyV2} {
		if hasLeaf(base, leaf) {
			out = append(out, topology(leaf, uint32(id), uint32(cpus), idBits)...)
		}
	}
	return out
}

// sharers returns how many APIC ids, less one, share the cache that eax of leaf
// 4 or 0x8000001d describes.
func sharers(eax, room uint32) uint32 {
	if level := eax >> 5 & 7; level < 3 {
		return 0
	}
	return room - 1
}

// topology returns the levels of leaf 0xb or 0x1f: one thread a core, then all
// cores, then none.
func topology(leaf, id, cpus, idBits uint32) []kvm.CPUIDEntry {
	const thread, core = 1 << 8, 2 << 8
	level := func(index, shift, count, kind uint32) kvm.CPUIDEntry {
		return kvm.CPUIDEntry{Function: leaf, Index: index, Flags: kvm.CPUIDSignificantIndex,
			Eax: shift, Ebx: count, Ecx: index | kind, Edx: id}
	}
	return []kvm.CPUIDEntry{level(0, 0, 1, thread), level(1, idBits, cpus, core), level(2, 0, 0, 0)}
}

func hasLeaf(list []kvm.CPUIDEntry, function uint32) bool {
	return slices.ContainsFunc(list, func(e kvm.CPUIDEntry) bool { return e.Function == function })
}

// leafOf returns a leaf, all zeros if the list does not have it.
func leafOf(list []kvm.CPUIDEntry, function, index uint32) kvm.CPUIDEntry {
	for _, e := range list {
		if e.Function == function && (e.Index == index || e.Flags&kvm.CPUIDSignificantIndex == 0) {
			return e
		}
	}
	return kvm.CPUIDEntry{Function: function, Index: index}
}

// vendorOf returns the twelve letters of leaf 0.
func vendorOf(list []kvm.CPUIDEntry) string {
	e := leafOf(list, leafVendor, 0)
	var b []byte
	for _, r := range []uint32{e.Ebx, e.Edx, e.Ecx} {
		b = append(b, byte(r), byte(r>>8), byte(r>>16), byte(r>>24))
	}
	return string(b)
}

func isAMD(list []kvm.CPUIDEntry) bool {
	v := vendorOf(list)
	return v == "AuthenticAMD" || v == "HygonGenuine"
}
