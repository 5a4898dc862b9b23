package machine

import (
	"errors"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/cpu"
)

// amdDECFG is DE_CFG, which no CPUID bit shows. Intel's processors do not have it, and KVM
// on AMD's knows one bit of it.
const amdDECFG = 0xc0011029

// TestFeatureMSRsBeforeMemory: a value of an MSR that describes the processor and that the
// destination's KVM refuses ends the migration before a page is sent, with its number and
// name. The guest goes on at the source, and can move with the values that KVM takes.
func TestFeatureMSRsBeforeMemory(t *testing.T) {
	m := newCounting(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	r := migrate.NewReceiver(&Builder{Log: vmtest.Log(t)}, vmtest.Log(t))
	go func() { _ = r.Serve(t.Context(), ln) }()
	real := m.kernel.features
	m.kernel.features = append(slices.Clone(real), kvm.MSR{Index: amdDECFG, Data: 1 << 63})
	result, err := migrate.New(m.Source(), ln.Addr().String(), migrate.Options{}).Run(t.Context())
	if !errors.Is(err, migrate.ErrRefused) || !strings.Contains(err.Error(), "MSR 0xc0011029 (DE_CFG): expected 0x8000000000000000 as in the guest, found ") {
		t.Fatalf("error %v, want a refusal that names the MSR", err)
	}
	if result.PagesSent != 0 {
		t.Errorf("%d pages were sent", result.PagesSent)
	}
	awaitChange(t, m, vmtest.CountAt, word(t, m, vmtest.CountAt))

	m.kernel.features = real
	_, err = migrate.New(m.Source(), ln.Addr().String(), migrate.Options{}).Run(t.Context())
	check(t, err)
	to := (<-r.Arrived()).(*Target)
	defer func() { check(t, to.Close()) }()
	awaitChange(t, to.Machine, vmtest.CountAt, word(t, to.Machine, vmtest.CountAt))
}

// TestCheckPreview: what a preview is refused for, and that neither a refused nor a good
// one changes the machine.
func TestCheckPreview(t *testing.T) {
	m := newMachine(t, 1, vmtest.JustCount, nil)
	to := built(t, m)
	fresh, err := cpu.ReadMSRs(to.vcpus[0].kvm, to.kernel.msrs)
	check(t, err)
	preview := func(list ...kvm.MSR) []byte {
		b, err := strictcbor.Marshal(statePreview{list})
		check(t, err)
		return b
	}
	own, err := m.Source().PreviewState()
	check(t, err)
	const platformInfo, cpuidFaulting, archCapabilities, sysenterCS, later = 0xce, 1 << 31, 0x10a, 0x174, 0x12345678
	type testCase struct {
		preview []byte
		says    string
	}
	cases := map[string]testCase{
		"its own":         {own, ""},
		"nothing":         {preview(), ""},
		"another value":   {preview(kvm.MSR{Index: platformInfo, Data: cpuidFaulting | 1}), ""},
		"not a feature":   {preview(kvm.MSR{Index: sysenterCS, Data: 1 << 63}), ""},
		"of a later time": {preview(kvm.MSR{Index: later, Data: 5}), ""},
		"zero":            {preview(kvm.MSR{Index: amdDECFG}), ""},
		"refused":         {preview(kvm.MSR{Index: amdDECFG, Data: 1 << 63}), "MSR 0xc0011029 (DE_CFG): expected 0x8000000000000000 as in the guest"},
		"often":           {preview(slices.Repeat([]kvm.MSR{{Index: amdDECFG, Data: 1 << 63}}, 4000)...), "DE_CFG"},
		"too often":       {preview(make([]kvm.MSR, 5000)...), "decode what is known of the machine's state"},
		"cut":             {own[:len(own)-1], "decode what is known of the machine's state"},
	}
	for _, f := range m.kernel.features {
		if f.Index == archCapabilities { // this host shows it to guests
			f.Data |= 1 << 63
			cases["capabilities"] = testCase{preview(f), "MSR 0x10a (ARCH_CAPABILITIES): expected"}
		}
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			err := to.CheckPreview(c.preview)
			if (err == nil) != (c.says == "") || err != nil && (!strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "\n")) {
				t.Errorf("error %v, want %q", err, c.says)
			}
			now, err := cpu.ReadMSRs(to.vcpus[0].kvm, to.kernel.msrs)
			check(t, err)
			if !slices.Equal(now, fresh) {
				t.Errorf("the MSRs %+v became %+v", fresh, now)
			}
		})
	}
}

// TestPreviewOfArrived: a guest that has arrived is described by the MSRs that came with
// it, and not by those of the host where it is.
func TestPreviewOfArrived(t *testing.T) {
	m := newMachine(t, 1, vmtest.JustCount, nil)
	s, err := m.saveState()
	check(t, err)
	const ucodeRevision = 0x8b // which KVM takes any value of
	v := &s.VCPUs[0]
	v.MSRs = append(slices.DeleteFunc(v.MSRs, func(m kvm.MSR) bool { return m.Index == ucodeRevision }), kvm.MSR{Index: ucodeRevision, Data: 77 << 32})
	to := fromSpec(t, m.Spec(), nil)
	check(t, to.loadState(s))
	b, err := to.Source().PreviewState()
	check(t, err)
	p, err := decodePreview(b)
	check(t, err)
	if !slices.Contains(p.MSRs, kvm.MSR{Index: ucodeRevision, Data: 77 << 32}) {
		t.Errorf("MSRs %+v", p.MSRs)
	}
}
