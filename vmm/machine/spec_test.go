package machine

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/cpu"
)

func TestSpecEncoding(t *testing.T) {
	s := aSpec()
	s.Cmdline = "fill=1M"
	b, err := s.encode(nil)
	check(t, err)
	got, err := decodeSpec(b, nil)
	check(t, err)
	if !reflect.DeepEqual(got, s) {
		t.Errorf("%.300v became %.300v", s, got)
	}
	for i := range b {
		if _, err := decodeSpec(b[:i], nil); err == nil {
			t.Errorf("a spec cut at %d was decoded", i)
		}
	}
}

// TestSpecRefuses: a spec from the network is checked, and the error names everything
// that is wrong.
func TestSpecRefuses(t *testing.T) {
	for _, c := range []struct {
		spoil func(*Spec)
		says  string
	}{
		{func(s *Spec) { s.Version = 2 }, "machine description: expected version 1, found 2"},
		{func(s *Spec) { s.Name = "" }, "name of 0 bytes"},
		{func(s *Spec) { s.Name = strings.Repeat("x", 65) }, "name of 65 bytes"},
		{func(s *Spec) { s.Name = "a\x1b[2J" }, `name "a\x1b[2J"`},
		{func(s *Spec) { s.Name = "../../etc" }, `name "../../etc"`},
		{func(s *Spec) { s.CPUs = 0 }, "0 vCPUs: must be between 1 and 254"},
		{func(s *Spec) { s.CPUs = -1 }, "-1 vCPUs"},
		{func(s *Spec) { s.CPUs = 255 }, "255 vCPUs"},
		{func(s *Spec) { s.Memory = 1 << 63 }, "memory of 9223372036854775808 bytes"},
		{func(s *Spec) { s.Memory = 4096 }, "memory of 4096 bytes"},
		{func(s *Spec) { s.Memory++ }, "memory of 536870913 bytes"},
		{func(s *Spec) { s.Backing = "floppy" }, "floppy"},
		{func(s *Spec) { s.Cmdline = strings.Repeat("x", 5000) }, "command line of 5000 bytes"},
		{func(s *Spec) { s.Kernel = nil }, "kernel of 0 bytes"},
		{func(s *Spec) { s.Kernel = []byte("MZ") }, "expected a Linux bzImage, or an uncompressed 64-bit x86 ELF"},
		{func(s *Spec) { s.CPUID = nil }, "0 CPUID leaves"},
		{func(s *Spec) { s.CPUID = slices.Repeat(s.CPUID, 100) }, "900 CPUID leaves"},
		{func(s *Spec) { s.Needs = make([]uint32, 300) }, "300 KVM capabilities"},
	} {
		s := aSpec()
		c.spoil(&s)
		b, err := s.encode(nil)
		check(t, err)
		if _, err := decodeSpec(b, nil); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("error %v, want %q", err, c.says)
		}
	}
	s := aSpec()
	s.CPUs, s.Memory, s.Kernel = 0, 0, make([]byte, MaxKernel+1)
	if list, ok := s.Validate().(interface{ Unwrap() []error }); !ok || len(list.Unwrap()) != 3 {
		t.Errorf("expected three errors: %v", s.Validate())
	}
	later, err := cbor.Marshal(map[string]any{"version": 9, "sockets": 4})
	check(t, err)
	if _, err := decodeSpec(later, nil); err == nil || err.Error() != "machine description: expected version 1, found 9" {
		t.Errorf("a later version: %v", err)
	}
	odd, err := cbor.Marshal(map[string]any{"version": 1, "sockets": 4})
	check(t, err)
	if _, err := decodeSpec(odd, nil); err == nil {
		t.Error("an unknown field was taken")
	}
}

func FuzzDecode(f *testing.F) {
	s := aSpec()
	b, err := s.encode(nil)
	check(f, err)
	f.Add(b)
	b, err = encodeState(&machineState{Version: stateVersion, VCPUs: make([]vcpuState, 1)})
	check(f, err)
	f.Add(b)
	b, err = strictcbor.Marshal(statePreview{[]kvm.MSR{{Index: 0x345, Data: 1}, {Index: 0x10a, Data: 2}}})
	check(f, err)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := decodeSpec(b, nil); err == nil {
			if err := s.Validate(); err != nil {
				t.Errorf("decoded, and not valid: %v", err)
			}
		}
		checkDecodedState(t, b)
		if p, err := decodePreview(b); err == nil && len(cpu.FeatureMSRs(aSpec().CPUID, p.MSRs)) > 16 {
			t.Errorf("%d MSRs of a peer are tried", len(p.MSRs))
		}
	})
}
