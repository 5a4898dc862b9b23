package cpu

import (
	"slices"
	"testing"

	"github.com/govmm/govmm/kvm"
)

func leaf(function, index, eax, ebx, ecx, edx uint32) kvm.CPUIDEntry {
	return kvm.CPUIDEntry{Function: function, Index: index, Flags: kvm.CPUIDSignificantIndex, Eax: eax, Ebx: ebx, Ecx: ecx, Edx: edx}
}

// Leaf 0 of "GenuineIntel" and "AuthenticAMD".
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
	three := ForVCPU(intel, 2, 3)
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
	one := ForVCPU(intel, 0, 1)
	if e := leafOf(one, 1, 0); e.Ebx != 0x00010800 || e.Edx != 0 {
		t.Errorf("one vCPU: leaf 1 is %#x, %#x", e.Ebx, e.Edx)
	}

	amd := []kvm.CPUIDEntry{amdLeaf, leaf(1, 0, 0, 0, 0, 0), leaf(0x80000001, 0, 0, 0, 0, 0), leaf(0x80000008, 0, 0x3030, 0, 0x7777, 0),
		leaf(0x8000001d, 3, 0x1c163, 0, 0, 0), leaf(0x8000001e, 0, 9, 9, 9, 9)}
	four := ForVCPU(amd, 3, 4)
	for _, want := range []kvm.CPUIDEntry{leaf(0x80000001, 0, 0, 0, 2, 0), leaf(0x80000008, 0, 0x3030, 0, 0x2003, 0),
		leaf(0x8000001d, 3, 0xc163, 0, 0, 0), leaf(0x8000001e, 0, 3, 3, 0, 0)} {
		if !slices.Contains(four, want) {
			t.Errorf("no %+v in %+v", want, four)
		}
	}
	if hasLeaf(four, leafTopology) {
		t.Error("leaf 0xb was made up")
	}
	if e := leafOf(ForVCPU(amd, 253, 254), 1, 0); e.Ebx>>24 != 253 || e.Ebx>>16&0xff != 255 {
		t.Errorf("254 vCPUs: %#x", e.Ebx)
	}
}
