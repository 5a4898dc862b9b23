package cpu

import (
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/kvm"
)

// TestFeatureMSRs: only what describes the processor, once, and only what the guest sees.
func TestFeatureMSRs(t *testing.T) {
	list := []kvm.MSR{{Index: 0x345, Data: 1}, {Index: 0x174, Data: 2}, {Index: 0x10a, Data: 3}, {Index: 0xce, Data: 4}, {Index: 0xce, Data: 5}}
	pdcm := []kvm.CPUIDEntry{{Function: leafFeatures, Ecx: 1 << 15}}
	for _, c := range []struct {
		cpuid []kvm.CPUIDEntry
		want  []kvm.MSR
	}{
		{nil, []kvm.MSR{{Index: 0xce, Data: 4}}},
		{pdcm, []kvm.MSR{{Index: 0xce, Data: 4}, {Index: 0x345, Data: 1}}},
	} {
		if got := FeatureMSRs(c.cpuid, list); !slices.Equal(got, c.want) {
			t.Errorf("with %+v: %+v, want %+v", c.cpuid, got, c.want)
		}
	}
	for _, f := range featureMSRs {
		if staysHere(f.index) {
			t.Errorf("MSR %s does not travel", msrName(f.index))
		}
	}
}

// TestArchCapabilities: a host that is vulnerable to what the guest believes it is safe
// from is refused. More safety, and weaknesses that the host does not have, are not.
func TestArchCapabilities(t *testing.T) {
	const rdclNo, rsba, skipL1DFlush, mdsNo = 1 << 0, 1 << 2, 1 << 3, 1 << 5
	for _, c := range []struct {
		guest, here uint64
		says        string
	}{
		{0, 0, ""},
		{rdclNo, rdclNo | mdsNo, ""},
		{rdclNo | rsba | skipL1DFlush, rdclNo, ""},
		{rdclNo | mdsNo, rdclNo, "MSR 0x10a (ARCH_CAPABILITIES): expected 0x21 as in the guest, found 0x1, which lacks 0x20"},
		{1 << 63, 0, "found 0x0, which lacks 0x8000000000000000"},
	} {
		err := lacksCapabilities([]kvm.MSR{{Index: 0x10a, Data: c.guest}}, []kvm.MSR{{Index: 0x10a, Data: c.here}})
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%#x on %#x: %v, want %q", c.guest, c.here, err, c.says)
		}
	}
	if err := lacksCapabilities([]kvm.MSR{{Index: 0x10a, Data: 1}}, nil); err == nil {
		t.Error("a host without the MSR is not refused")
	}
}
