package cpu

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/kvm"
)

func TestMSROrder(t *testing.T) {
	list := []uint32{msrTSCDeadline, 0x174, msrKVMAsyncPF, 0x4b564d06, 0xc0000081}
	slices.SortStableFunc(list, func(a, b uint32) int { return turn(a) - turn(b) })
	if want := []uint32{0x174, 0x4b564d06, 0xc0000081, msrKVMAsyncPF, msrTSCDeadline}; !slices.Equal(list, want) {
		t.Errorf("order %#x, want %#x", list, want)
	}
}

// TestCheckMSRs: what this host would not have saved is refused by its number before
// anything is loaded, unless it is zero or the guest cannot see it, and then it is left
// out.
func TestCheckMSRs(t *testing.T) {
	known := []uint32{0x174, 0x175, 0x176, msrTSCDeadline}
	list := func(pairs ...uint64) (l []kvm.MSR) {
		for i := 0; i < len(pairs); i += 2 {
			l = append(l, kvm.MSR{Index: uint32(pairs[i]), Data: pairs[i+1]})
		}
		return l
	}
	const pmc = 0xc1 // which CPUID can show
	counters := []kvm.CPUIDEntry{{Function: leafCounters, Eax: 2}}
	for name, c := range map[string]struct {
		cpuid []kvm.CPUIDEntry
		saved []kvm.MSR
		says  []string
		loads []uint32
	}{
		"all":         {nil, list(0x174, 1, 0x175, 2, 0x176, 3, msrTSCDeadline, 4), nil, known},
		"some":        {nil, list(0x175, 2, msrTSCDeadline, 4), nil, []uint32{0x175, msrTSCDeadline}},
		"none":        {nil, nil, nil, nil},
		"other order": {nil, list(0x176, 3, 0x174, 1), nil, []uint32{0x176, 0x174}},
		"zero":        {nil, list(0x174, 1, 0x9999, 0), nil, []uint32{0x174}},
		"not seen":    {nil, list(pmc, 7, 0x174, 1), nil, []uint32{0x174}},
		"seen":        {counters, list(pmc, 7, 0x174, 1), []string{"MSR 0xc1: is 0x7 in the guest"}, []uint32{0x174}},
		"unknown":     {nil, list(0x9999, 1, 0x174, 1, 0x9998, 2), []string{"MSR 0x9999: is 0x1 in", "MSR 0x9998: is 0x2 in"}, []uint32{0x174}},
		"TSC":         {nil, list(MSRTSC, 1), []string{"MSR 0x10: "}, nil},
		"Hyper-V":     {nil, list(msrHyperVFirst, 1), []string{"MSR 0x40000000: "}, nil},
		"VMX":         {nil, list(msrVMXFirst, 1), []string{"MSR 0x480: "}, nil},
		"SVM":         {nil, list(msrSVMHostSave, 1), []string{"MSR 0xc0010117: "}, nil},
		"wall clock":  {nil, list(msrKVMWallClock, 0x1000), []string{"MSR 0x4b564d00: "}, nil},
		"twice":       {nil, list(0x174, 1, 0x174, 2), []string{"MSR 0x174: is there twice"}, []uint32{0x174, 0x174}},
		"zeros twice": {nil, list(0x9999, 0, 0x9999, 0), []string{"MSR 0x9999: is there twice"}, nil},
	} {
		err := CheckMSRs(c.cpuid, known, c.saved)
		if (err == nil) != (c.says == nil) {
			t.Errorf("%s: error %v, want %q", name, err, c.says)
		}
		for _, says := range c.says {
			if !strings.Contains(err.Error(), says) {
				t.Errorf("%s: error %v, want %q in it", name, err, says)
			}
		}
		var loads []uint32
		for _, m := range loadable(known, c.saved) {
			loads = append(loads, m.Index)
		}
		if !slices.Equal(loads, c.loads) {
			t.Errorf("%s: loads %#x, want %#x", name, loads, c.loads)
		}
	}
	many := make([]kvm.MSR, 100_000)
	for i := range many {
		many[i] = kvm.MSR{Index: 0x10000 + uint32(i), Data: 1}
	}
	if err := CheckMSRs(nil, known, many); err == nil || strings.Count(err.Error(), "\n") != 7 {
		t.Errorf("many that are not known: %.200v", err)
	}
}

// FuzzCheckMSRs: of a list that passes, only what this host saves is loaded, each once,
// and what is left out the guest does not miss.
func FuzzCheckMSRs(f *testing.F) {
	f.Add([]byte{0x74, 1, 0, 0, 1, 0x75, 1, 0, 0, 2}, uint32(0))
	f.Add([]byte{0x75, 1, 0, 0, 0, 0x74, 1, 0, 0, 2, 0xc1, 0, 0, 0, 7}, uint32(2))
	f.Add([]byte{0x10, 0, 0, 0, 1, 0, 0, 0, 0x40, 1}, uint32(0))
	known := SavedMSRs([]uint32{0x174, 0x175, 0x176})
	f.Fuzz(func(t *testing.T, b []byte, counters uint32) {
		cpuid := []kvm.CPUIDEntry{{Function: leafCounters, Eax: counters}}
		var saved []kvm.MSR
		for ; len(b) >= 5; b = b[5:] {
			saved = append(saved, kvm.MSR{Index: binary.LittleEndian.Uint32(b), Data: uint64(b[4])})
		}
		if CheckMSRs(cpuid, known, saved) != nil {
			return
		}
		seen := map[uint32]bool{}
		for _, m := range loadable(known, saved) {
			if seen[m.Index] || !slices.Contains(known, m.Index) {
				t.Errorf("MSR %#x is loaded, before: %v", m.Index, seen[m.Index])
			}
			seen[m.Index] = true
		}
		for _, m := range saved {
			if !seen[m.Index] && m.Data != 0 && shows(cpuid, m.Index) {
				t.Errorf("MSR %#x is %#x in the guest, which sees it, and is left out", m.Index, m.Data)
			}
		}
	})
}
