package kvm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"testing"

	"github.com/govmm/govmm/internal/strictcbor"
	"golang.org/x/sys/unix"
)

func TestRegs(t *testing.T) {
	_, v := newChipVCPU(t)
	want := Regs{RAX: 1, RBX: 2, RCX: 3, RDX: 4, RSI: 5, RDI: 6, RSP: 7, RBP: 8, R8: 9, R9: 10, R10: 11, R11: 12,
		R12: 13, R13: 14, R14: 15, R15: 1 << 63, RIP: 0x1234, RFLAGS: 2}
	check(t, v.SetRegs(want))
	if got := must(v.GetRegs())(t); got != want {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

func TestSregs(t *testing.T) {
	_, v := newChipVCPU(t)
	s := must(v.GetSregs())(t)
	if s.CS.Base != 0xffff0000 || s.CS.Selector != 0xf000 {
		t.Errorf("CS after reset: %+v", s.CS)
	}
	s.CS.Base, s.CS.Selector, s.CR2 = 0x10000, 0x1000, 0x5678
	check(t, v.SetSregs(s))
	if got := must(v.GetSregs())(t); got != s {
		t.Errorf("got %+v\nwant %+v", got, s)
	}
	if have := must(openKVM(t).CheckExtension(CapSREGS2))(t); have == 0 {
		if _, err := v.GetSregs2(); err == nil {
			t.Error("KVM_GET_SREGS2 without its capability")
		}
		return
	}
	s2 := must(v.GetSregs2())(t)
	if s2.CS != s.CS || s2.CR2 != 0x5678 || s2.APICBase != s.APICBase {
		t.Errorf("SREGS2 %+v\ndiffer from SREGS %+v", s2, s)
	}
	s2.CR2 = 0x9abc
	check(t, v.SetSregs2(s2))
	if got := must(v.GetSregs2())(t); got != s2 {
		t.Errorf("got %+v\nwant %+v", got, s2)
	}
	s.CR0, s.CR4 = 1<<31, 0 // paging without protection
	if err := v.SetSregs(s); !errors.Is(err, unix.EINVAL) {
		t.Errorf("impossible CR0: %v", err)
	}
}

func TestDebugRegsAndXCRS(t *testing.T) {
	vm, v := newChipVCPU(t)
	d := must(v.GetDebugRegs())(t)
	d.DB[0], d.DB[3] = 0x1234, 0x5678
	check(t, v.SetDebugRegs(d))
	if got := must(v.GetDebugRegs())(t); got != d {
		t.Errorf("got %+v\nwant %+v", got, d)
	}
	check(t, v.SetCPUID2(must(openKVM(t).SupportedCPUID())(t)))
	x := must(v.GetXCRS())(t)
	if x.Count < 1 || x.Registers[0].Value&1 == 0 {
		t.Fatalf("XCRs %+v, want XCR0 with x87", x)
	}
	x.Registers[0].Value = 3 // and SSE
	check(t, v.SetXCRS(x))
	if got := must(v.GetXCRS())(t); got != x {
		t.Errorf("got %+v\nwant %+v", got, x)
	}
	x.Registers[0].Value = 0 // x87 cannot be off
	wantErr(t, v.SetXCRS(x), unix.EINVAL, "KVM_SET_XCRS vCPU 0: invalid argument")
	_ = vm
}

// The guest's registers have the values of the loaded XSAVE state.
func TestXSAVE(t *testing.T) {
	vm := newVM(t)
	g := newRing3Guest(t, vm,
		0x0f, 0x11, 0x03, // movups %xmm0, (%rbx)
		0x88, 0x01, // mov %al, (%rcx)
	)
	const headerAt, xmm0At = 512, 160
	state := must(g.GetXSAVE())(t)
	if len(state) != g.xsaveSize || len(state) < xsaveLegacySize {
		t.Fatalf("%d bytes, expected %d", len(state), g.xsaveSize)
	}
	t.Logf("XSAVE state of %d bytes, KVM_GET_XSAVE2: %v", len(state), g.xsave2)
	pattern := []byte("0123456789abcdef")
	copy(state[xmm0At:], pattern)
	state[headerAt] |= 2 // XSTATE_BV: SSE in use
	check(t, g.SetXSAVE(state))
	if got := must(g.GetXSAVE())(t); !bytes.Equal(got[xmm0At:xmm0At+16], pattern) {
		t.Errorf("XMM0 % x after loading % x", got[xmm0At:xmm0At+16], pattern)
	}
	check(t, g.SetRegs(Regs{RIP: codeAt, RFLAGS: 2, RBX: 0x8000, RCX: nowhere}))
	g.next(t, ExitMMIO)
	if got := g.low[0x8000:0x8010]; !bytes.Equal(got, pattern) {
		t.Errorf("the guest's XMM0 is % x, want % x", got, pattern)
	}

	// States of other sizes.
	check(t, g.SetXSAVE(state[:1024]))
	check(t, g.SetXSAVE(append(append([]byte(nil), state...), make([]byte, 100)...)))
	long := append(append([]byte(nil), state...), 1)
	wantErr(t, g.SetXSAVE(long), unix.EINVAL, "KVM_SET_XSAVE vCPU 0, "+decimal(len(long))+" bytes: expected at most "+
		decimal(len(state))+" bytes: invalid argument")
	binary.LittleEndian.PutUint64(state[headerAt:], 1<<62)
	if err := g.SetXSAVE(state); !errors.Is(err, unix.EINVAL) {
		t.Errorf("an unknown component in use: %v", err)
	}
}

func TestLAPICMPStateAndEvents(t *testing.T) {
	vm, v := newChipVCPU(t)
	l := must(v.GetLAPIC())(t)
	l.Regs[0x80], l.Regs[0xa0] = 0x20, 0x20 // task priority, and the processor's that follows
	check(t, v.SetLAPIC(l))
	if got := must(v.GetLAPIC())(t); got != l {
		t.Errorf("APIC registers changed:\n% x\n% x", got.Regs, l.Regs)
	}
	ap := must(vm.CreateVCPU(1))(t)
	defer func() { check(t, ap.Close()) }()
	if s := must(ap.GetMPState())(t); s != MPUninitialized {
		t.Errorf("vCPU 1 is %v, want uninitialized", s)
	}
	check(t, v.SetMPState(MPHalted))
	if s := must(v.GetMPState())(t); s != MPHalted {
		t.Errorf("vCPU 0 is %v, want halted", s)
	}
	wantErr(t, v.SetMPState(99), unix.EINVAL, "KVM_SET_MP_STATE vCPU 0 MP state 99: invalid argument")

	e := must(v.GetVCPUEvents())(t)
	check(t, v.SetVCPUEvents(e))
	e.NMI.Pending, e.Flags = 1, e.Flags|1<<0 // KVM_VCPUEVENT_VALID_NMI_PENDING
	check(t, v.SetVCPUEvents(e))
	if got := must(v.GetVCPUEvents())(t); got.NMI.Pending != 1 {
		t.Errorf("a pending NMI was lost: %+v", got)
	}
	e.Flags = 1 << 31
	wantErr(t, v.SetVCPUEvents(e), unix.EINVAL, "KVM_SET_VCPU_EVENTS vCPU 0 flags 0x80000000: invalid argument")
}

func TestCPUID2(t *testing.T) {
	_, v := newChipVCPU(t)
	supported := must(openKVM(t).SupportedCPUID())(t)
	check(t, v.SetCPUID2(supported))
	got := must(v.GetCPUID2())(t)
	if len(got) == 0 || got[0] != supported[0] {
		t.Errorf("%d leaves, first %+v; %d were set, first %+v", len(got), got, len(supported), supported[0])
	}
	if len(got) != len(supported) {
		t.Logf("THIS KVM ANSWERS WITH ANOTHER CPUID LIST: %d leaves, %d were set", len(got), len(supported))
	}
	check(t, v.SetCPUID2(got)) // the same list can be set again
	wantErr(t, v.SetCPUID2(make([]CPUIDEntry, 257)), unix.EINVAL, "KVM_SET_CPUID2 vCPU 0: expected at most 256 entries, got 257: invalid argument")
}

func TestTSC(t *testing.T) {
	vm, v := newChipVCPU(t)
	khz := must(v.TSCKHz())(t)
	if khz == 0 {
		t.Fatal("TSC of 0 kHz")
	}
	check(t, v.SetTSCKHz(khz))
	err := v.SetTSCKHz(khz / 2)
	if have := must(vm.CheckExtension(CapTSCControl))(t); have == 0 {
		wantErr(t, err, unix.EINVAL, "KVM_SET_TSC_KHZ vCPU 0 "+decimal(int(khz/2))+" kHz: invalid argument")
	} else {
		check(t, err)
		check(t, v.SetTSCKHz(khz))
	}
	offset, err := v.TSCOffset()
	if errors.Is(err, errors.ErrUnsupported) {
		wantErr(t, v.SetTSCOffset(0), errors.ErrUnsupported,
			"KVM_SET_DEVICE_ATTR vCPU 0 TSC offset 0x0: this KVM has no KVM_VCPU_TSC_OFFSET: unsupported operation")
		return
	}
	check(t, err)
	check(t, v.SetTSCOffset(offset))
	moved := offset + 1<<40
	if err := v.SetTSCOffset(moved); errors.Is(err, errors.ErrUnsupported) {
		wantErr(t, err, errors.ErrUnsupported, "KVM_SET_DEVICE_ATTR vCPU 0 TSC offset "+hex(uintptr(moved))+
			": this KVM keeps "+hex(uintptr(offset))+": unsupported operation")
		t.Logf("THIS KVM IGNORES TSC OFFSETS: %v", err)
	} else {
		check(t, err)
		if got := must(v.TSCOffset())(t); got != moved {
			t.Errorf("offset %#x, want %#x", got, moved)
		}
	}
}

func TestKVMClockCtrl(t *testing.T) {
	_, v := newChipVCPU(t)
	wantErr(t, v.KVMClockCtrl(), unix.EINVAL, "KVM_KVMCLOCK_CTRL vCPU 0: invalid argument")
	const systemTimeNew = 0x4b564d01 // MSR_KVM_SYSTEM_TIME_NEW, with its enable bit
	check(t, v.SetCPUID2(must(openKVM(t).SupportedCPUID())(t)))
	must(v.SetMSRs([]MSR{{Index: systemTimeNew, Data: 0x8000 | 1}}))(t)
	check(t, v.KVMClockCtrl())
}

func TestTranslate(t *testing.T) {
	vm := newVM(t)
	g := newRing3Guest(t, vm, 0x90)
	tr := must(g.Translate(0x12345))(t)
	if tr.Valid == 0 || tr.PhysicalAddress != 0x12345 {
		t.Errorf("%+v, want the same address", tr)
	}
	if tr = must(g.Translate(1 << 40))(t); tr.Valid != 0 {
		t.Errorf("%+v, want not mapped", tr)
	}
}

func TestMSRs(t *testing.T) {
	_, v := newChipVCPU(t)
	s := openKVM(t)
	check(t, v.SetCPUID2(must(s.SupportedCPUID())(t)))
	list := must(s.MSRIndexList())(t)
	// Refused MSRs are reported, all others are returned, and can be written except
	// those that are reported then.
	saved, err := v.GetMSRs(list)
	var refused *MSRError
	if err != nil && !errors.As(err, &refused) {
		t.Fatal(err)
	}
	if refused != nil {
		t.Log(refused)
	}
	if n := len(saved) + refusals(refused); n != len(list) {
		t.Errorf("%d values and refusals of %d MSRs", n, len(list))
	}
	refused = nil
	n, err := v.SetMSRs(saved)
	if err != nil && !errors.As(err, &refused) {
		t.Fatal(err)
	}
	if refused != nil {
		t.Log(refused)
	}
	if n+refusals(refused) != len(saved) {
		t.Errorf("%d landed, %d refused, of %d", n, refusals(refused), len(saved))
	}

	// More MSRs than in one batch, with refused ones at the ends of batches.
	const sysenterCS, bogus = 0x174, 0xdeadbeef
	var many []MSR
	for i := range uint64(3 * msrBatch) {
		many = append(many, MSR{Index: sysenterCS, Data: i})
	}
	many[0].Index, many[msrBatch].Index, many[len(many)-1].Index = bogus, bogus+1, bogus+2
	n, err = v.SetMSRs(many)
	want := "KVM_SET_MSRS vCPU 0: the kernel refused MSR 0xdeadbeef, 0xdeadbef0, 0xdeadbef1"
	if n != len(many)-3 || err == nil || err.Error() != want {
		t.Errorf("%d landed, error %v\nwant %s", n, err, want)
	}
	got, err := v.GetMSRs([]uint32{bogus, sysenterCS})
	if len(got) != 1 || got[0].Data != uint64(len(many)-2) || !errors.As(err, &refused) ||
		!reflect.DeepEqual(refused.Refused, []uint32{bogus}) {
		t.Errorf("got %+v, %v; want the last write that landed", got, err)
	}
	if got, err := v.GetMSRs(nil); len(got) != 0 || err != nil {
		t.Errorf("no MSRs: %v, %v", got, err)
	}
}

func refusals(e *MSRError) int {
	if e == nil {
		return 0
	}
	return len(e.Refused)
}

// All states can be encoded and decoded without a change.
func TestStatesEncode(t *testing.T) {
	vm, v := newChipVCPU(t)
	check(t, vm.CreatePIT2(0))
	roundTrip(t, must(v.GetRegs())(t))
	roundTrip(t, must(v.GetSregs())(t))
	roundTrip(t, must(v.GetSregs2())(t))
	roundTrip(t, must(v.GetDebugRegs())(t))
	roundTrip(t, must(v.GetXCRS())(t))
	roundTrip(t, must(v.GetLAPIC())(t))
	roundTrip(t, must(v.GetVCPUEvents())(t))
	roundTrip(t, must(v.GetMPState())(t))
	roundTrip(t, must(vm.GetIRQChip(ChipIOAPIC))(t))
	roundTrip(t, must(vm.GetPIT2())(t))
	roundTrip(t, must(vm.GetClock())(t))
	roundTrip(t, must(openKVM(t).SupportedCPUID())(t))
	roundTrip(t, MSR{Index: 1, Data: 2})
}

func roundTrip[T any](t *testing.T, state T) {
	t.Helper()
	data := must(strictcbor.Marshal(state))(t)
	var got T
	check(t, strictcbor.Unmarshal(data, &got))
	if !reflect.DeepEqual(got, state) {
		t.Errorf("%T: got %+v\nwant %+v", state, got, state)
	}
}
