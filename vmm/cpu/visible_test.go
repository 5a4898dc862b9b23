package cpu

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/govmm/govmm/kvm"
)

func TestWhatCPUIDShows(t *testing.T) {
	pdcm := []kvm.CPUIDEntry{{Function: leafFeatures, Ecx: 1 << 15}}
	counting := []kvm.CPUIDEntry{{Function: leafCounters, Eax: 2}}
	poll := []kvm.CPUIDEntry{{Function: leafKVMFeatures, Eax: 1 << 12}}
	for _, c := range []struct {
		cpuid []kvm.CPUIDEntry
		msr   uint32
		want  bool
	}{
		{nil, 0x345, false}, {pdcm, 0x345, true}, {pdcm, 0x10a, false},
		{nil, 0x186, false}, {counting, 0x186, true}, {counting, 0x38f, true},
		{nil, 0x4b564d05, false}, {poll, 0x4b564d05, true}, {poll, 0x4b564d03, false},
		{nil, 0xc0000104, false},
		{nil, 0x277, true}, {nil, 0xc0000080, true}, {nil, 0x4b564d01, true}, // what every guest has
	} {
		if got := shows(c.cpuid, c.msr); got != c.want {
			t.Errorf("MSR %#x with %+v: %v", c.msr, c.cpuid, got)
		}
	}
	for i, s := range shownBy {
		if s.first > s.last || len(s.features) == 0 {
			t.Errorf("entry %d: %#x to %#x by %d features", i, s.first, s.last, len(s.features))
		}
		for _, other := range shownBy[:i] {
			if s.first <= other.last && other.first <= s.last {
				t.Errorf("%#x is there twice", s.first)
			}
		}
	}
}

// TestHideXSAVE: components that the guest cannot know go, with what lies behind the rest
// of the area; those that it has, or has turned on, stay.
func TestHideXSAVE(t *testing.T) {
	avx := []kvm.CPUIDEntry{subleaf(leafXState, 0, xstateAVX, 832, 832, 0), subleaf(leafXState, 2, 256, 576, 0, 0)}
	state := bytes.Repeat([]byte{7}, 3000)
	put := func(bv uint64) { binary.LittleEndian.PutUint64(state[xstateBV:], bv) }
	bv := func(b []byte) uint64 { return binary.LittleEndian.Uint64(b[xstateBV:]) }
	xcr0 := kvm.XCRS{Count: 1}
	xcr0.Registers[0] = kvm.XCR{Value: 1 << 9}

	put(7 | 1<<9 | 1<<18)
	got := HideXSAVE(state, avx, kvm.XCRS{})
	if bv(got) != 7 || bytes.Count(got[832:], []byte{0}) != 3000-832 || !bytes.Equal(got[520:832], state[520:832]) || len(got) != len(state) {
		t.Errorf("components %#x", bv(got))
	}
	if bv(state) != 7|1<<9|1<<18 || state[2999] != 7 {
		t.Error("the saved state has changed")
	}
	if got := HideXSAVE(state, avx, xcr0); bv(got) != 7|1<<9 {
		t.Errorf("with a component turned on: %#x", bv(got))
	}
	put(7)
	if got := HideXSAVE(state, avx, kvm.XCRS{}); &got[0] != &state[0] {
		t.Error("a state with nothing to hide is copied")
	}
	if got := HideXSAVE(state[:100], avx, kvm.XCRS{Count: 1 << 31}); len(got) != 100 {
		t.Error("a state without a header has changed")
	}
}
