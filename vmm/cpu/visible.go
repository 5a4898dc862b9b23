package cpu

import (
	"encoding/binary"
	"slices"

	"github.com/govmm/govmm/kvm"
)

// shownBy says which features show MSRs to a guest (Intel SDM volume 4, APM volume 2,
// Documentation/virt/kvm/x86/cpuid.rst). A guest that sees none of the features relies on
// none of these MSRs, whatever the host on which it started has in them.
var shownBy = []struct {
	first, last uint32
	features    []feature // any of them
}{
	{0x3a, 0x3a, []feature{{leafFeatures, 0, ecx, 5}, {leafFeatures, 0, ecx, 6}, {leafExtended, 0, ebx, 2}}}, // FEATURE_CONTROL: vmx, smx, sgx
	{0xcf, 0xcf, []feature{{leafExtended, 0, edx, 30}}},                                                      // CORE_CAPABILITIES
	{0x10a, 0x10a, []feature{{leafExtended, 0, edx, 29}}},                                                    // ARCH_CAPABILITIES
	{0x122, 0x122, []feature{{leafExtended, 0, edx, 29}}},                                                    // TSX_CTRL
	{0x1c4, 0x1c5, []feature{{leafXState, 1, eax, 4}}},                                                       // XFD, XFD_ERR
	{0x345, 0x345, []feature{{leafFeatures, 0, ecx, 15}}},                                                    // PERF_CAPABILITIES: pdcm
	{0x48, 0x48, []feature{{leafExtended, 0, edx, 26}, {leafExtended, 0, edx, 27}, {leafExtended, 0, edx, 31},
		{leafAMDSizes, 0, ebx, 14}, {leafAMDSizes, 0, ebx, 15}, {leafAMDSizes, 0, ebx, 24}}}, // SPEC_CTRL
	{0x570, 0x587, []feature{{leafExtended, 0, ebx, 25}}},                                          // RTIT_*: intel_pt
	{0x6a0, 0x6a8, []feature{{leafExtended, 0, ecx, 7}, {leafExtended, 0, edx, 20}}},               // CET: shstk, ibt
	{0xd90, 0xd90, []feature{{leafExtended, 0, ebx, 14}}},                                          // BNDCFGS: mpx
	{0xda0, 0xda0, []feature{{leafXState, 1, eax, 3}}},                                             // XSS: xsaves
	{0x4b564d02, 0x4b564d02, []feature{{leafKVMFeatures, 0, eax, 4}}},                              // ASYNC_PF_EN
	{0x4b564d03, 0x4b564d03, []feature{{leafKVMFeatures, 0, eax, 5}}},                              // STEAL_TIME
	{0x4b564d04, 0x4b564d04, []feature{{leafKVMFeatures, 0, eax, 6}}},                              // PV_EOI_EN
	{0x4b564d05, 0x4b564d05, []feature{{leafKVMFeatures, 0, eax, 12}}},                             // POLL_CONTROL
	{0x4b564d06, 0x4b564d07, []feature{{leafKVMFeatures, 0, eax, 14}}},                             // ASYNC_PF_INT, ASYNC_PF_ACK
	{0x4b564d08, 0x4b564d08, []feature{{leafKVMFeatures, 0, eax, 17}}},                             // MIGRATION_CONTROL
	{0xc0000103, 0xc0000103, []feature{{leafAMDFeatures, 0, edx, 27}, {leafExtended, 0, ecx, 22}}}, // TSC_AUX: rdtscp, rdpid
	{0xc0000104, 0xc0000104, []feature{{leafSVM, 0, edx, 4}}},                                      // TSC_RATIO: tsc_scale
	{0xc001011f, 0xc001011f, []feature{{leafAMDSizes, 0, ebx, 25}}},                                // VIRT_SPEC_CTRL
	{0xc0010200, 0xc001020b, []feature{{leafAMDFeatures, 0, ecx, 23}}},                             // PERF_CTL*, PERF_CTR*: perfctr_core
	{0xc0000300, 0xc0000303, []feature{{leafAMDCounters, 0, eax, 0}}},                              // PERF_CNTR_GLOBAL_*: perfmon_v2
	{0xc1, 0xc8, counters}, {0x186, 0x18d, counters}, {0x309, 0x30c, counters}, {0x38d, 0x390, counters}, // PMCs and their control
	{0x3f1, 0x3f2, counters}, {0x4c1, 0x4c8, counters},
}

// leafAMDCounters describes performance counters of AMD's processors.
const leafAMDCounters = 0x80000022

// counters are the bits of the version of Intel's performance counters; 0: there are none.
var counters = []feature{{leafCounters, 0, eax, 0}, {leafCounters, 0, eax, 1}, {leafCounters, 0, eax, 2}}

// feature is a bit of a guest's CPUID.
type feature struct {
	function, index uint32
	register        func(kvm.CPUIDEntry) uint32
	bit             int
}

func (f feature) in(cpuid []kvm.CPUIDEntry) bool {
	return f.register(leafOf(cpuid, f.function, f.index))>>f.bit&1 != 0
}

// shows says whether a guest with this CPUID can rely on an MSR.
func shows(cpuid []kvm.CPUIDEntry, msr uint32) bool {
	for _, s := range shownBy {
		if msr >= s.first && msr <= s.last {
			return slices.ContainsFunc(s.features, func(f feature) bool { return f.in(cpuid) })
		}
	}
	return true
}

// Offsets in an XSAVE area (Intel SDM volume 1, 13.4.2).
const (
	xstateBV     = 512
	xstateHeader = 512 + 64
)

// HideXSAVE returns the XSAVE state of a guest without the components that its CPUID
// does not have and its XCR0 does not enable: some kernels save those of the host, and
// others refuse to load them. x87 and SSE always stay.
func HideXSAVE(state []byte, cpuid []kvm.CPUIDEntry, xcrs kvm.XCRS) []byte {
	if len(state) < xstateHeader {
		return state // KVM will say what it thinks of it
	}
	user, system := leafOf(cpuid, leafXState, 0), leafOf(cpuid, leafXState, 1)
	keep := uint64(3) | uint64(user.Edx)<<32 | uint64(user.Eax) | uint64(system.Edx)<<32 | uint64(system.Ecx)
	for _, x := range xcrs.Registers[:min(int(xcrs.Count), len(xcrs.Registers))] {
		if x.Number == 0 {
			keep |= x.Value
		}
	}
	has := binary.LittleEndian.Uint64(state[xstateBV:])
	if has&^keep == 0 {
		return state
	}
	state = slices.Clone(state)
	binary.LittleEndian.PutUint64(state[xstateBV:], has&keep)
	end := xstateHeader // of what is left; the area of another host may be longer
	for i := uint32(2); i < 63; i++ {
		if c := leafOf(cpuid, leafXState, i); has&keep>>i&1 != 0 {
			end = max(end, int(c.Ebx)+int(c.Eax))
		}
	}
	clear(state[min(end, len(state)):])
	return state
}
