package vmm

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/loader/elftest"
	"github.com/govmm/govmm/vmm/memory"
)

func leaf(function, index, eax, ebx, ecx, edx uint32) kvm.CPUIDEntry {
	return kvm.CPUIDEntry{Function: function, Index: index, Flags: kvm.CPUIDSignificantIndex, Eax: eax, Ebx: ebx, Ecx: ecx, Edx: edx}
}

// vendor leaves: "GenuineIntel" and "AuthenticAMD".
var (
	intelLeaf = leaf(0, 0, 0x20, 0x756e6547, 0x6c65746e, 0x49656e69)
	amdLeaf   = leaf(0, 0, 0x10, 0x68747541, 0x444d4163, 0x69746e65)
)

func TestGuestCPUIDHides(t *testing.T) {
	all := ^uint32(0)
	host := []kvm.CPUIDEntry{intelLeaf, leaf(1, 0, 0, 0, all&^(1<<24|1<<31), all), leaf(7, 0, 2, all, all, all), leaf(7, 1, all, all, all, all),
		leaf(0x12, 0, 1, 1, 1, 1), leaf(0x1d, 1, 1, 1, 1, 1), leaf(0x80000001, 0, 0, 0, all, all), leaf(0x8000000a, 0, 1, 1, 1, 1), leaf(0x40000001, 0, 5, 0, 0, 0)}
	g := guestCPUID(host, true, 7)
	for _, c := range []struct {
		function, index uint32
		register        func(kvm.CPUIDEntry) uint32
		want            uint32
	}{
		{1, 0, ecx, all &^ (1<<3 | 1<<5 | 1<<27)}, // monitor, vmx, osxsave; hypervisor and deadline are there
		{1, 0, edx, all},
		{7, 0, ebx, all &^ (1 << 2)},                                  // sgx
		{7, 0, ecx, all &^ (1<<4 | 1<<30)},                            // ospke, sgx_lc
		{7, 0, edx, all &^ (1<<22 | 1<<24 | 1<<25)},                   // amx
		{7, 1, eax, all &^ (1 << 21)},                                 // amx
		{0x80000001, 0, ecx, all &^ (1 << 2)},                         // svm
		{0x8000000a, 0, eax, 0}, {0x12, 0, eax, 0}, {0x1d, 1, eax, 0}, // gone
		{0x40000001, 0, eax, 5}, // KVM's own stay
	} {
		if got := c.register(leafOf(g, c.function, c.index)); got != c.want {
			t.Errorf("leaf %#x.%d: %#x, want %#x", c.function, c.index, got, c.want)
		}
	}
	if g := guestCPUID(host, false, 1<<18); leafOf(g, 1, 0).Ecx&(1<<24) != 0 || leafOf(g, 7, 0).Edx != all || leafOf(g, 0x1d, 1).Eax != 1 {
		t.Error("a TSC deadline that KVM does not have, or no AMX although it is permitted")
	}
}

func TestCPUIDOfVCPUs(t *testing.T) {
	intel := []kvm.CPUIDEntry{intelLeaf, leaf(1, 0, 0x806f8, 0x55ff0800, 0, 0), leaf(4, 0, 0x1c004121, 1, 2, 3), leaf(4, 3, 0x1c03c163, 1, 2, 3),
		leaf(4, 4, 0, 0, 0, 0), leaf(0xb, 0, 9, 9, 9, 9), leaf(0x1f, 0, 9, 9, 9, 9), leaf(0x80000008, 0, 0x3930, 0, 0, 0)}
	three := cpuidOf(intel, 2, 3)
	for _, want := range []kvm.CPUIDEntry{
		leaf(1, 0, 0x806f8, 0x02040800, 0, 1<<28),
		leaf(4, 0, 0x0c000121, 1, 2, 3), // its own
		leaf(4, 3, 0x0c00c163, 1, 2, 3), // shared by four APIC ids
		leaf(4, 4, 0, 0, 0, 0),
		leaf(0xb, 0, 0, 1, 0x100, 2), leaf(0xb, 1, 2, 3, 0x201, 2), leaf(0xb, 2, 0, 0, 2, 2),
		leaf(0x1f, 0, 0, 1, 0x100, 2), leaf(0x1f, 1, 2, 3, 0x201, 2), leaf(0x1f, 2, 0, 0, 2, 2),
		leaf(0x80000008, 0, 0x3930, 0, 0, 0),
	} {
		if !slices.Contains(three, want) {
			t.Errorf("no %+v in %+v", want, three)
		}
	}
	if n := len(three); n != len(intel)+4 {
		t.Errorf("%d leaves", n)
	}
	one := cpuidOf(intel, 0, 1)
	if e := leafOf(one, 1, 0); e.Ebx != 0x00010800 || e.Edx != 0 {
		t.Errorf("one vCPU: leaf 1 is %#x, %#x", e.Ebx, e.Edx)
	}

	amd := []kvm.CPUIDEntry{amdLeaf, leaf(1, 0, 0, 0, 0, 0), leaf(0x80000001, 0, 0, 0, 0, 0), leaf(0x80000008, 0, 0x3030, 0, 0x7777, 0),
		leaf(0x8000001d, 3, 0x1c163, 0, 0, 0), leaf(0x8000001e, 0, 9, 9, 9, 9)}
	four := cpuidOf(amd, 3, 4)
	for _, want := range []kvm.CPUIDEntry{leaf(0x80000001, 0, 0, 0, 2, 0), leaf(0x80000008, 0, 0x3030, 0, 0x2003, 0),
		leaf(0x8000001d, 3, 0xc163, 0, 0, 0), leaf(0x8000001e, 0, 3, 3, 0, 0)} {
		if !slices.Contains(four, want) {
			t.Errorf("no %+v in %+v", want, four)
		}
	}
	if hasLeaf(four, leafTopology) {
		t.Error("leaf 0xb was made up")
	}
	if e := leafOf(cpuidOf(amd, 253, 254), 1, 0); e.Ebx>>24 != 253 || e.Ebx>>16&0xff != 255 {
		t.Errorf("254 vCPUs: %#x", e.Ebx)
	}
}

// aHost is a host that has all that this spec needs.
func aHost(s Spec) host {
	return host{cpuid: slices.Clone(s.CPUID), tscKHz: 2_600_000, maxCPUs: 8,
		capability: func(kvm.Capability) (int, error) { return 1, nil },
		available:  func(memory.Backing) (uint64, error) { return 1 << 30, nil }}
}

func aSpec() Spec {
	return Spec{Version: SpecVersion, Name: "vm", CPUs: 2, Memory: 512 << 20, Backing: memory.Anonymous, Kernel: elftest.Build(elftest.Kernel{Code: justCount}),
		TSCKHz: 2_600_000, Needs: needs(caps{sregs2: true}),
		CPUID: []kvm.CPUIDEntry{intelLeaf, leaf(1, 0, 0, 0, 1<<28|1<<12, 0), leaf(7, 0, 0, 1<<16|1<<5, 0, 1<<24), leaf(0xa, 0, 0x08300802, 0, 0, 0x603),
			leaf(0xd, 0, 0x207, 0, 0, 0), leaf(0xd, 2, 256, 576, 0, 0), leaf(0xd, 9, 8, 2688, 0, 0), leaf(0x40000001, 0, 1<<24|1<<5, 0, 0, 0),
			leaf(0x80000008, 0, 0x3030, 0, 0, 0)}}
}

// TestIncompatible: each thing that does not fit is found, and named; all of
// them at once.
func TestIncompatible(t *testing.T) {
	ok := aHost(aSpec())
	s := aSpec()
	if err := ok.incompatible(&s); err != nil {
		t.Fatalf("a twin host: %v", err)
	}
	set := func(h *host, e kvm.CPUIDEntry) {
		i := slices.IndexFunc(h.cpuid, func(o kvm.CPUIDEntry) bool { return o.Function == e.Function && o.Index == e.Index })
		h.cpuid[i] = e
	}
	cases := []struct {
		spoil func(*host)
		says  string
	}{
		{func(h *host) { h.maxCPUs = 1 }, "2 vCPUs: this host's KVM runs at most 1"},
		{func(h *host) { h.available = func(memory.Backing) (uint64, error) { return 511 << 20, nil } }, "memory of 512 MiB (anonymous): this host has 511 MiB available"},
		{func(h *host) {
			h.capability = func(c kvm.Capability) (int, error) {
				if c == kvm.CapSREGS2 {
					return 0, nil
				}
				return 1, nil
			}
		}, "this host's KVM lacks capability 200 (CapSREGS2)"},
		{func(h *host) { h.tscKHz = 2_700_000 }, "TSC of 2600000 kHz: this host's runs at 2700000 kHz and its KVM cannot scale it (KVM_CAP_TSC_CONTROL)"},
		{func(h *host) { set(h, amdLeaf) }, `CPU: the guest was started on "GenuineIntel", this host is "AuthenticAMD"`},
		{func(h *host) { set(h, leaf(1, 0, 0, 0, 0, 0)) }, "CPU: CPUID 0x1 ECX lacks fma, avx"},
		{func(h *host) { set(h, leaf(7, 0, 0, 0, 0, 0)) }, "CPU: CPUID 0x7.0 EBX lacks avx2, avx512f"},
		{func(h *host) { set(h, leaf(7, 0, 0, 0, 0, 0)) }, "CPU: CPUID 0x7.0 EDX lacks amx_tile"},
		{func(h *host) { set(h, leaf(0x40000001, 0, 1<<5, 0, 0, 0)) }, "CPU: CPUID 0x40000001 EAX lacks kvmclock_stable"},
		{func(h *host) { set(h, leaf(0xd, 0, 7, 0, 0, 0)) }, "CPU: CPUID 0xd.0 EAX lacks pkru-state"},
		{func(h *host) { set(h, leaf(0xd, 9, 8, 2432, 0, 0)) }, "CPU: XSAVE component 9 has 8 bytes at offset 2688, here 8 at 2432"},
		{func(h *host) { set(h, leaf(0x80000008, 0, 0x3027, 0, 0, 0)) }, "CPU: physical addresses of 48 bits, here 39"},
		{func(h *host) { set(h, leaf(0xa, 0, 0, 0, 0, 0)) }, "CPU: performance counters differ"},
	}
	worst := aHost(s)
	for _, c := range cases {
		h := aHost(s)
		c.spoil(&h)
		if err := h.incompatible(&s); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("error %v, want %q", err, c.says)
		}
		c.spoil(&worst)
	}
	err := worst.incompatible(&s)
	list, isList := err.(interface{ Unwrap() []error })
	if !isList || len(list.Unwrap()) != len(cases) {
		t.Errorf("all at once: %v", err)
	}
	t.Log(err)

	scaling := aHost(s)
	scaling.tscKHz, scaling.tscControl = 1_000_000, true
	near := aHost(s)
	near.tscKHz += near.tscKHz / 5000
	for _, h := range []host{scaling, near} {
		if err := h.incompatible(&s); err != nil {
			t.Error(err)
		}
	}
	s.Needs = []uint32{5000}
	if err := ok.incompatible(&s); err == nil || !strings.Contains(err.Error(), "KVM capability 5000 is needed and not known here") {
		t.Error(err)
	}
	s.Needs = nil
	ok.available = func(memory.Backing) (uint64, error) { return 0, errors.New("no /proc") }
	if err := ok.incompatible(&s); err == nil || !strings.Contains(err.Error(), "how much memory") {
		t.Error(err)
	}
}

// TestThisHostFitsItself, and what it has is plausible.
func TestThisHostFitsItself(t *testing.T) {
	needKVM(t)
	spec, err := NewSpec(testConfig(1, justCount))
	check(t, err)
	m := fromSpec(t, spec, nil)
	spec = m.Spec()
	check(t, fitsHere(&spec))
	if spec.TSCKHz < 100_000 || len(spec.Needs) == 0 {
		t.Errorf("TSC of %d kHz, needs %v", spec.TSCKHz, spec.Needs)
	}
	spec.Memory = memory.MaxSize
	spec.CPUs = MaxCPUs
	err = fitsHere(&spec)
	if err == nil || !strings.Contains(err.Error(), "MiB available") {
		t.Errorf("16 TiB: %v", err)
	}
	for _, b := range []memory.Backing{memory.Anonymous, memory.Hugetlb} {
		if _, err := availableMemory(b); err != nil {
			t.Error(err)
		}
	}
	if _, err := meminfo("Nonsense"); err == nil {
		t.Error("/proc/meminfo has Nonsense")
	}
}
