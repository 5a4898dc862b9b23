package machine

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/memory"
)

func leaf(function, index, eax, ebx, ecx, edx uint32) kvm.CPUIDEntry {
	return kvm.CPUIDEntry{Function: function, Index: index, Flags: kvm.CPUIDSignificantIndex, Eax: eax, Ebx: ebx, Ecx: ecx, Edx: edx}
}

// Leaf 0 of "GenuineIntel" and "AuthenticAMD".
var (
	intelLeaf = leaf(0, 0, 0x20, 0x756e6547, 0x6c65746e, 0x49656e69)
	amdLeaf   = leaf(0, 0, 0x10, 0x68747541, 0x444d4163, 0x69746e65)
)

// aHost is a host that has everything that the spec needs.
func aHost(s Spec) host {
	return host{cpuid: slices.Clone(s.CPUID), tscKHz: 2_600_000, maxCPUs: 8,
		capability: func(kvm.Capability) (int, error) { return 1, nil },
		admit:      func(uint64, memory.Backing, bool) error { return nil }}
}

func aSpec() Spec {
	return Spec{Version: SpecVersion, Name: "vm", CPUs: 2, Memory: 512 << 20, Backing: memory.Anonymous, Kernel: vmtest.Kernel(vmtest.JustCount),
		TSCKHz: 2_600_000, Needs: needs(caps{sregs2: true}),
		CPUID: []kvm.CPUIDEntry{intelLeaf, leaf(1, 0, 0, 0, 1<<28|1<<12, 0), leaf(7, 0, 0, 1<<16|1<<5, 0, 1<<24), leaf(0xa, 0, 0x08300802, 0, 0, 0x603),
			leaf(0xd, 0, 0x207, 0, 0, 0), leaf(0xd, 2, 256, 576, 0, 0), leaf(0xd, 9, 8, 2688, 0, 0), leaf(0x40000001, 0, 1<<24|1<<5, 0, 0, 0),
			leaf(0x80000008, 0, 0x3030, 0, 0, 0)}}
}

// TestIncompatible: the error names each thing that does not fit, and all of them if
// there are several.
func TestIncompatible(t *testing.T) {
	ok := aHost(aSpec())
	s := aSpec()
	if err := ok.incompatible(&s); err != nil {
		t.Fatalf("a host with the same: %v", err)
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
		{func(h *host) {
			h.admit = func(size uint64, b memory.Backing, _ bool) error {
				return fmt.Errorf("memory of %d MiB (%s): no", size>>20, b)
			}
		}, "memory of 512 MiB (anonymous): no"},
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
	if err := ok.incompatible(&s); err == nil || !strings.Contains(err.Error(), "KVM capability 5000 is needed, and this govmm does not know it") {
		t.Error(err)
	}
	s.Needs = nil
	s.Overcommit = true
	ok.admit = func(_ uint64, _ memory.Backing, overcommit bool) error {
		if !overcommit {
			return errors.New("overcommit is not allowed")
		}
		return nil
	}
	if err := ok.incompatible(&s); err != nil {
		t.Error(err)
	}
}

// TestThisHostFitsItself: a machine of this host fits this host, and what the host says
// of itself is plausible.
func TestThisHostFitsItself(t *testing.T) {
	m := fromSpec(t, testSpec(t, 1, vmtest.JustCount), nil)
	spec := m.Spec()
	check(t, fitsHere(&spec))
	if spec.TSCKHz < 100_000 || len(spec.Needs) == 0 {
		t.Errorf("TSC of %d kHz, needs %v", spec.TSCKHz, spec.Needs)
	}
	spec.Memory = memory.MaxSize
	spec.CPUs = MaxCPUs
	err := fitsHere(&spec)
	if err == nil || !strings.Contains(err.Error(), "MiB available") {
		t.Errorf("16 TiB: %v", err)
	}
}
