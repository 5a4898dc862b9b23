package cpu

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/kvm"
)

// processor is what CPUID says on a host, as far as baselines use it.
type processor struct {
	name             string
	vendor           kvm.CPUIDEntry
	signature        uint32
	ecx1, edx1, ebx7 uint32
	ecxExt, edxExt   uint32
	xstate           uint32 // leaf 0xd
	physical         uint32 // bits
	kvm              uint32 // KVM's features, which differ between kernels
}

var hygonLeaf = leaf(0, 0, 0xd, 0x6f677948, 0x656e6975, 0x6e65476e)

// Processors that were written for the test, with the features of those that they are
// named after: they are not dumps of real ones. What baselines do not use is missing.
var (
	core2       = processor{"Core 2 E8400", intelLeaf, 0x1067a, 0x0008e3fd, 0xbfebfbff, 0, 0x00000001, 0x20100800, 0, 36, 0x01007efb}
	nehalem     = processor{"Core i7-920", intelLeaf, 0x106a5, 0x0098e3bd, 0xbfebfbff, 0, 0x00000001, 0x28100800, 0, 36, 0x01007efb}
	sandyBridge = processor{"Core i7-2600K", intelLeaf, 0x206a7, 0x1fbae3ff, 0xbfebfbff, 0, 0x00000001, 0x28100800, 7, 36, 0x01007efb}
	haswell     = processor{"Core i7-4770K", intelLeaf, 0x306c3, 0x7fdafbbf, 0xbfebfbff, 0x000027ab, 0x00000021, 0x2c100800, 7, 39, 0x01007efb}
	iceLake     = processor{"Xeon of Ice Lake", intelLeaf, 0x606a6, 0x7ffefbff, 0xbfebfbff, 0xf2bf67eb, 0x00000121, 0x2c100800, 0x2e7, 46, 0x0100fefb}
	zen1        = processor{"Ryzen 7 1800X", amdLeaf, 0x800f11, 0x7ed8320b, 0x178bfbff, 0x209c01a9, 0x35c233ff, 0x2fd3fbff, 7, 48, 0x01007efb}
	zen5        = processor{"EPYC of Zen 5", amdLeaf, 0xb00f21, 0x7efa320b, 0x178bfbff, 0xf1bf97a9, 0x75c237ff, 0x2fd3fbff, 0x2e7, 52, 0x0100fefb}
	hygon       = processor{"Hygon C86", hygonLeaf, 0x900f02, 0x7ed8320b, 0x178bfbff, 0x209c01a9, 0x35c233ff, 0x2fd3fbff, 7, 48, 0x01007efb}
)

// host returns what guestCPUID makes of the CPUID that KVM supports on such a host.
func (p processor) host() []kvm.CPUIDEntry {
	const x2apic = 1 << 21 // KVM's own
	list := []kvm.CPUIDEntry{p.vendor, leaf(1, 0, p.signature, 0x00100800, p.ecx1|x2apic, p.edx1), leaf(6, 0, 4, 0, 0, 0),
		leaf(7, 0, 0, p.ebx7, 0, 0xac000400), leaf(4, 3, 0x1c03c163, 1, 2, 3), leaf(0xa, 0, 0x07300404, 0, 0, 0x603),
		leaf(0xd, 0, p.xstate, 0, 0, 0), leaf(0xd, 1, 0xf, 0, 0, 0), leaf(0xd, 2, 256, 576, 0, 0), leaf(0xd, 9, 8, 2688, 0, 0),
		leaf(0x40000000, 0, 0x40000001, 0x4b4d564b, 0x564b4d56, 0x4d), leaf(0x40000001, 0, p.kvm, 0, 0, 0),
		leaf(0x80000000, 0, 0x80000021, 0, 0, 0), leaf(0x80000001, 0, p.signature, 0, p.ecxExt, p.edxExt),
		leaf(0x80000002, 0, 1, 2, 3, 4), leaf(0x80000007, 0, 0, 0, 0, 1<<8),
		leaf(0x80000008, 0, 0x3000|p.physical, 0x01003000, 0x7777, 0), leaf(0x80000021, 0, 0x45, 0, 0, 0)}
	return guestCPUID(list, true, 0)
}

func (p processor) as(t *testing.T, model string) []kvm.CPUIDEntry {
	t.Helper()
	b, err := baselineOf(model)
	testenv.Check(t, err)
	list, err := b.cpuid(p.host(), 1<<30)
	if err != nil {
		t.Fatalf("%s: %v", p.name, err)
	}
	return list
}

// TestBaselineIsTheSame: everything that is passed to KVM_SET_CPUID2 for each of four
// vCPUs is the same on all processors of a vendor that have the level.
func TestBaselineIsTheSame(t *testing.T) {
	for _, c := range []struct {
		model string
		hosts []processor
	}{
		{"x86-64-v2", []processor{nehalem, sandyBridge, haswell, iceLake}},
		{"x86-64-v3", []processor{haswell, iceLake}},
		{"x86-64-v2", []processor{zen1, zen5}},
		{"x86-64-v3", []processor{zen1, zen5}},
	} {
		first := c.hosts[0].as(t, c.model)
		for _, p := range c.hosts[1:] {
			list := p.as(t, c.model)
			for id := range 4 {
				if a, b := ForVCPU(first, id, 4), ForVCPU(list, id, 4); !reflect.DeepEqual(a, b) {
					t.Errorf("%s on %s and on %s: %+v and %+v", c.model, c.hosts[0].name, p.name, a, b)
				}
			}
		}
		if len(first) > 30 {
			t.Errorf("%d leaves", len(first))
		}
	}
}

// TestBaselineFeatures: a baseline has the features of its level in table 3.1 of the
// psABI, named as in Linux, and what a guest of KVM needs, and no others.
func TestBaselineFeatures(t *testing.T) {
	const base = "fpu, vme, de, pse, tsc, msr, pae, mce, cx8, apic, sep, mtrr, pge, mca, cmov, pat, pse36, clflush, mmx, fxsr, sse, sse2"
	for _, c := range []struct {
		p     processor
		model string
		want  map[string]string
	}{
		{iceLake, "x86-64-v2", map[string]string{
			"CPUID 0x1 ECX":        "sse3, ssse3, cx16, sse4_1, sse4_2, x2apic, popcnt, tsc_deadline_timer, hypervisor",
			"CPUID 0x1 EDX":        base,
			"CPUID 0x6 EAX":        "arat",
			"CPUID 0x40000001 EAX": "kvmclock, kvm_nopiodelay, kvmclock2, kvm_steal_time, kvm_pv_eoi, kvm_pv_unhalt, kvm_pv_tlb_flush, kvm_pv_ipi, kvm_pv_sched_yield, kvmclock_stable",
			"CPUID 0x80000001 ECX": "lahf_lm",
			"CPUID 0x80000001 EDX": "syscall, nx, lm",
			"CPUID 0x80000007 EDX": "constant_tsc",
		}},
		{zen5, "x86-64-v3", map[string]string{
			"CPUID 0x1 ECX":        "sse3, ssse3, fma, cx16, sse4_1, sse4_2, x2apic, movbe, popcnt, tsc_deadline_timer, xsave, avx, f16c, hypervisor",
			"CPUID 0x1 EDX":        base,
			"CPUID 0x6 EAX":        "arat",
			"CPUID 0x7.0 EBX":      "bmi1, avx2, bmi2",
			"CPUID 0xd.0 EAX":      "x87-state, sse-state, avx-state",
			"CPUID 0x40000001 EAX": "kvmclock, kvm_nopiodelay, kvmclock2, kvm_steal_time, kvm_pv_eoi, kvm_pv_unhalt, kvm_pv_tlb_flush, kvm_pv_ipi, kvm_pv_sched_yield, kvmclock_stable",
			"CPUID 0x80000001 ECX": "lahf_lm, abm",
			"CPUID 0x80000001 EDX": "bit 0, bit 1, bit 2, bit 3, bit 4, bit 5, bit 6, bit 7, bit 8, bit 9, syscall, bit 12, bit 13, bit 14, bit 15, bit 16, bit 17, nx, bit 23, bit 24, lm",
			"CPUID 0x80000007 EDX": "constant_tsc",
		}},
	} {
		list := c.p.as(t, c.model)
		for _, w := range featureWords {
			if got := w.bitNames(w.value(leafOf(list, w.function, w.index))); got != c.want[w.String()] {
				t.Errorf("%s, %v: %s; want %s", c.model, w, got, c.want[w.String()])
			}
		}
		// Leaves that no baseline has.
		for _, function := range []uint32{leafCounters, leafAMDFeatures2, leafAMDTopology, leafAMDCaches} {
			if hasLeaf(list, function) {
				t.Errorf("%s has leaf %#x", c.model, function)
			}
		}
		bits := map[string]uint32{"x86-64-v2": 36, "x86-64-v3": 39}[c.model]
		if e := leafOf(list, leafAMDSizes, 0); e != (kvm.CPUIDEntry{Function: leafAMDSizes, Eax: 48<<8 | bits}) {
			t.Errorf("sizes %+v", e)
		}
	}
	if e := leafOf(haswell.as(t, "x86-64-v3"), 0xd, 0); e.Ebx != 832 || e.Ecx != 832 {
		t.Errorf("XSAVE area %+v", e)
	}
	name := ""
	for i := range uint32(3) {
		e := leafOf(zen1.as(t, "x86-64-v3"), leafBrand+i, 0)
		for _, r := range []uint32{e.Eax, e.Ebx, e.Ecx, e.Edx} {
			name += string([]byte{byte(r), byte(r >> 8), byte(r >> 16), byte(r >> 24)})
		}
	}
	if strings.TrimRight(name, "\x00") != "govmm x86-64-v3" {
		t.Errorf("brand %q", name)
	}
}

// TestBaselineRefused: the error names what the host lacks.
func TestBaselineRefused(t *testing.T) {
	zhaoxin := nehalem
	zhaoxin.vendor = leaf(0, 0, 0xd, 0x68532020, 0x20206961, 0x68676e61)
	noClock := haswell
	noClock.kvm &^= 1 << 24
	noDeadline := guestCPUID(slices.DeleteFunc(haswell.host(), func(e kvm.CPUIDEntry) bool { return e.Function == leafFeatures }), true, 0)
	for _, c := range []struct {
		host        []kvm.CPUIDEntry
		model, says string
	}{
		{core2.host(), "x86-64-v2", "CPU x86-64-v2: this host lacks sse4_2, popcnt (CPUID 0x1 ECX)"},
		{nehalem.host(), "x86-64-v3", "CPU x86-64-v3: this host lacks fma, movbe, xsave, avx, f16c (CPUID 0x1 ECX); bmi1, avx2, bmi2 (CPUID 0x7.0 EBX); x87-state, sse-state, avx-state (CPUID 0xd.0 EAX); abm (CPUID 0x80000001 ECX); physical addresses of 39 bits (CPUID 0x80000008 EAX: 36)"},
		{sandyBridge.host(), "x86-64-v3", "CPU x86-64-v3: this host lacks fma, movbe, f16c (CPUID 0x1 ECX); bmi1, avx2, bmi2 (CPUID 0x7.0 EBX); abm (CPUID 0x80000001 ECX); physical addresses of 39 bits (CPUID 0x80000008 EAX: 36)"},
		{noClock.host(), "x86-64-v3", "CPU x86-64-v3: this host lacks kvmclock_stable (CPUID 0x40000001 EAX)"},
		{zhaoxin.host(), "x86-64-v2", `CPU x86-64-v2: this host's processor is "  Shanghai  "; baselines exist for processors of Intel, AMD and Hygon`},
	} {
		b, err := baselineOf(c.model)
		testenv.Check(t, err)
		if _, err := b.cpuid(c.host, 1<<30); err == nil || err.Error() != c.says {
			t.Errorf("error %v, want %s", err, c.says)
		}
	}
	b, _ := baselineOf("x86-64-v2")
	if _, err := b.cpuid(noDeadline, 1<<30); err == nil || !strings.Contains(err.Error(), "tsc_deadline_timer") {
		t.Errorf("%v", err)
	}
	hygon.as(t, "x86-64-v3")
	for _, name := range []string{"x86-64-v4", "Host", "haswell", "x86-64"} {
		if _, err := baselineOf(name); err == nil || !strings.Contains(err.Error(), "must be one of host, x86-64-v2, x86-64-v3") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"", "host"} {
		if b, err := baselineOf(name); b != nil || err != nil {
			t.Errorf("%q: %v, %v", name, b, err)
		}
	}
}

// TestMixedFleet: a guest with a baseline can move to each host that has the level, in
// both directions. A guest without one can move only to hosts that have all features of
// its processor. The error names what is missing.
func TestMixedFleet(t *testing.T) {
	for _, c := range []struct {
		from  processor
		model string
		to    processor
		says  []string // nil: it fits
	}{
		{haswell, "x86-64-v3", iceLake, nil},
		{iceLake, "x86-64-v3", haswell, nil},
		{iceLake, "x86-64-v2", nehalem, nil},
		{haswell, "x86-64-v2", haswell, nil},
		{zen5, "x86-64-v3", zen1, nil},
		{zen1, "x86-64-v2", zen5, nil},
		{iceLake, "x86-64-v3", sandyBridge, []string{
			"CPU: CPUID 0x1 ECX lacks fma, movbe, f16c", "CPU: CPUID 0x7.0 EBX lacks bmi1, avx2, bmi2", "CPU: CPUID 0x80000001 ECX lacks abm",
			"CPU: physical addresses of 39 bits, here 36"}},
		{haswell, "x86-64-v2", zen5, []string{`CPU: the guest was started on "GenuineIntel", this host is "AuthenticAMD"`}},
		{haswell, "host", iceLake, nil},
		{iceLake, "host", haswell, []string{"CPU: CPUID 0x7.0 EBX lacks fdp_excptn_only, mpx, avx512f, avx512dq"}},
	} {
		list := c.from.host()
		if c.model != Host {
			list = c.from.as(t, c.model)
		}
		errs := Differences(list, c.to.host())
		for _, says := range c.says {
			if !slices.ContainsFunc(errs, func(err error) bool { return strings.HasPrefix(err.Error(), says) }) {
				t.Errorf("%s of %s on %s: %v; want %s", c.model, c.from.name, c.to.name, errs, says)
			}
		}
		if c.says == nil && errs != nil {
			t.Errorf("%s of %s on %s: %v", c.model, c.from.name, c.to.name, errs)
		}
	}
}

func TestPhysicalBits(t *testing.T) {
	b, err := baselineOf("x86-64-v3")
	testenv.Check(t, err)
	for size, want := range map[uint64]uint32{16 << 20: 39, 511 << 30: 39, 512 << 30: 40, 1 << 40: 41, 16 << 40: 45} {
		if got := b.physicalBits(size); got != want {
			t.Errorf("%d GiB: %d bits, want %d", size>>30, got, want)
		}
	}
	const says = "CPU x86-64-v3: this host lacks physical addresses of 40 bits (CPUID 0x80000008 EAX: 39)"
	if _, err := b.cpuid(haswell.host(), 512<<30); err == nil || err.Error() != says {
		t.Errorf("error %v, want %s", err, says)
	}
}

// TestCPUIDOf32: each of 32 vCPUs has its APIC id in all the leaves that have it.
func TestCPUIDOf32(t *testing.T) {
	for _, p := range []processor{haswell, zen5} {
		for _, base := range [][]kvm.CPUIDEntry{p.host(), p.as(t, "x86-64-v2"), p.as(t, "x86-64-v3")} {
			for id := range uint32(32) {
				list := ForVCPU(base, int(id), 32)
				if e := leafOf(list, 1, 0); e.Ebx>>24 != id || e.Ebx>>16&0xff != 32 || e.Edx&edx1HTT == 0 {
					t.Errorf("%s, vCPU %d: leaf 1 %+v", p.name, id, e)
				}
				if isAMD(base) {
					if e := leafOf(list, leafAMDSizes, 0); e.Ecx != 31|5<<12 {
						t.Errorf("%s, vCPU %d: %+v", p.name, id, e)
					}
				}
				if !hasLeaf(base, leafTopology) {
					continue
				}
				for index, want := range []kvm.CPUIDEntry{leaf(0xb, 0, 0, 1, 0x100, id), leaf(0xb, 1, 5, 32, 0x201, id), leaf(0xb, 2, 0, 0, 2, id)} {
					if e := leafOf(list, leafTopology, uint32(index)); e != want {
						t.Errorf("%s, vCPU %d: %+v, want %+v", p.name, id, e, want)
					}
				}
			}
		}
	}
}

func ExampleModels() {
	fmt.Println(Models())
	// Output: [host x86-64-v2 x86-64-v3]
}

// TestForeignHypervisor: KVM turns on the interface of another hypervisor for a guest
// whose CPUID has its leaves, so a guest that has some is refused.
func TestForeignHypervisor(t *testing.T) {
	own := haswell.host()
	if errs := Differences(own, own); errs != nil {
		t.Fatalf("%v", errs)
	}
	for name, l := range map[string][]kvm.CPUIDEntry{
		"Hyper-V's features": {{Function: 0x40000003, Eax: 0x2e7f}},
		"Xen's":              {{Function: 0x40000100, Eax: 0x40000104, Ebx: 0x566e6558, Ecx: 0x65584d4d, Edx: 0x4d4d566e}},
		"another signature":  {{Function: 0x40000000, Eax: 0x4000000a, Ebx: 0x7263694d, Ecx: 0x666f736f, Edx: 0x76482074}},
	} {
		want := slices.DeleteFunc(slices.Clone(own), func(e kvm.CPUIDEntry) bool { return e.Function == l[0].Function })
		errs := Differences(append(want, l...), own)
		if len(errs) != 1 || !strings.Contains(errs[0].Error(), fmt.Sprintf("leaf %#x of a hypervisor", l[0].Function)) {
			t.Errorf("%s: %v", name, errs)
		}
	}
}
