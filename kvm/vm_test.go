package kvm

import (
	"errors"
	"reflect"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestEnableCap(t *testing.T) {
	vm := newVM(t)
	for _, c := range []Capability{CapExceptionPayload, CapX86TripleFaultEvent} {
		have := must(vm.CheckExtension(c))(t)
		err := vm.EnableCap(c, 1)
		if (err == nil) != (have != 0) {
			t.Errorf("%v is %d, enabling it: %v", c, have, err)
		}
	}
	wantErr(t, vm.EnableCap(Capability(255)), unix.EINVAL, "KVM_ENABLE_CAP Capability(255) []: invalid argument")
	wantErr(t, vm.EnableCap(CapExceptionPayload, 1, 2, 3, 4, 5), unix.EINVAL,
		"KVM_ENABLE_CAP CapExceptionPayload: expected at most 4 arguments, got 5: invalid argument")
}

func TestTSSAndIdentityMap(t *testing.T) {
	vm := newVM(t)
	check(t, vm.SetTSSAddr(0xfffbd000))
	check(t, vm.SetIdentityMapAddr(0xfffbc000))
	wantErr(t, vm.SetTSSAddr(1<<32), unix.EINVAL,
		"KVM_SET_TSS_ADDR 0x100000000: expected three pages below 4 GiB: invalid argument")
	newVCPU(t, vm)
	wantErr(t, vm.SetIdentityMapAddr(0xfffbc000), unix.EINVAL, "KVM_SET_IDENTITY_MAP_ADDR 0xfffbc000: invalid argument")
}

func TestCreateVCPU(t *testing.T) {
	vm := newVM(t)
	v := newVCPU(t, vm)
	if v.ID() != 0 {
		t.Errorf("id %d", v.ID())
	}
	_, err := vm.CreateVCPU(0)
	wantErr(t, err, unix.EEXIST, "KVM_CREATE_VCPU vCPU 0: file exists")
	_, err = vm.CreateVCPU(-1)
	wantErr(t, err, unix.EINVAL, "KVM_CREATE_VCPU vCPU -1: negative: invalid argument")
	_, err = vm.CreateVCPU(1 << 20)
	wantErr(t, err, unix.EINVAL, "KVM_CREATE_VCPU vCPU 1048576: invalid argument")
}

// picIRR returns the interrupt request registers of both PICs.
func picIRR(t *testing.T, vm *VM) uint16 {
	t.Helper()
	const irr = 1 // offset in struct kvm_pic_state
	master, slave := must(vm.GetIRQChip(ChipPICMaster))(t), must(vm.GetIRQChip(ChipPICSlave))(t)
	return uint16(master.Chip[irr]) | uint16(slave.Chip[irr])<<8
}

func TestIRQChip(t *testing.T) {
	vm := newVM(t)
	if err := vm.IRQLine(4, true); !errors.Is(err, unix.ENXIO) {
		t.Errorf("no chips: %v", err)
	}
	check(t, vm.CreateIRQChip())
	if err := vm.CreateIRQChip(); !errors.Is(err, unix.EEXIST) {
		t.Errorf("a second time: %v", err)
	}
	check(t, vm.IRQLine(4, true))
	check(t, vm.IRQLine(12, true))
	if got := picIRR(t, vm) &^ (1 << 2); got != 1<<4|1<<12 { // line 2 is the cascade
		t.Errorf("requests %#x, want lines 4 and 12", got)
	}
	// A saved state can be loaded in another VM.
	other := newVM(t)
	check(t, other.CreateIRQChip())
	for id := ChipPICMaster; id <= ChipIOAPIC; id++ {
		state := must(vm.GetIRQChip(id))(t)
		check(t, other.SetIRQChip(state))
		if got := must(other.GetIRQChip(id))(t); got != state {
			t.Errorf("chip %d is not what was loaded:\n% x\n% x", id, got.Chip, state.Chip)
		}
	}
	_, err := vm.GetIRQChip(3)
	wantErr(t, err, unix.EINVAL, "KVM_GET_IRQCHIP chip 3: invalid argument")
}

func TestPIT2(t *testing.T) {
	vm := newVM(t)
	check(t, vm.CreateIRQChip()) // required by kernels after Linux 6.1
	check(t, vm.CreatePIT2(PITSpeakerDummy))
	state := must(vm.GetPIT2())(t)
	state.Channels[0].Count, state.Channels[0].Mode = 0x1234, 2
	check(t, vm.SetPIT2(state))
	got := must(vm.GetPIT2())(t)
	if c := got.Channels[0]; c.Count != 0x1234 || c.Mode != 2 {
		t.Errorf("channel 0 is %+v", c)
	}
}

func TestGSIRouting(t *testing.T) {
	vm, v := newChipVCPU(t)
	routes := vm.DefaultRoutes()
	if len(routes) != 40 {
		t.Errorf("%d default routes", len(routes))
	}
	check(t, vm.SetGSIRouting(routes))
	check(t, vm.IRQLine(5, true))
	if got := picIRR(t, vm); got != 1<<5 {
		t.Errorf("default routes, GSI 5: requests %#x", got)
	}
	check(t, vm.IRQLine(5, false))
	// GSI 5 to line 3; GSI 30 to a message with vector 0x51 for APIC 0.
	check(t, vm.SetGSIRouting([]IRQRoute{
		{GSI: 5, Chip: ChipPICMaster, Pin: 3},
		{GSI: 30, MSI: true, Address: 0xfee00000, Data: 0x51},
	}))
	check(t, vm.IRQLine(5, true))
	if got := picIRR(t, vm); got&(1<<3) == 0 {
		t.Errorf("GSI 5 led to line 3: requests %#x", got)
	}
	l := must(v.GetLAPIC())(t)
	l.Regs[0xf1] |= 1 // spurious vector register: APIC enabled
	check(t, v.SetLAPIC(l))
	check(t, vm.IRQLine(30, true))
	if l = must(v.GetLAPIC())(t); l.Regs[0x200+0x10*(0x51/32)+0x11/8]&(1<<(0x11%8)) == 0 {
		t.Errorf("vector 0x51 is not in the APIC's request register: % x", l.Regs[0x200:0x280])
	}
	wantErr(t, vm.SetGSIRouting([]IRQRoute{{GSI: 1, Chip: 7}}), unix.EINVAL, "KVM_SET_GSI_ROUTING 1 routes: invalid argument")
	wantErr(t, vm.SetGSIRouting(make([]IRQRoute, maxIRQRoutes+1)), unix.EINVAL,
		"KVM_SET_GSI_ROUTING 4097 routes: expected at most 4096: invalid argument")
}

// A message is in the local APIC that it names when SignalMSI returns; one that nobody takes
// is lost.
func TestSignalMSI(t *testing.T) {
	vm, v := newChipVCPU(t)
	l := must(v.GetLAPIC())(t)
	l.Regs[0xf1] |= 1 // spurious vector register: APIC enabled
	check(t, v.SetLAPIC(l))
	requested := func(vector int) bool {
		l := must(v.GetLAPIC())(t)
		return l.Regs[0x200+0x10*(vector/32)+vector%32/8]>>(vector%8)&1 != 0
	}
	for vector := 0x51; vector < 0x61; vector++ {
		if !must(vm.SignalMSI(0xfee00000, uint32(vector)))(t) || !requested(vector) {
			t.Errorf("vector %#x is not in the APIC's request register", vector)
		}
	}
	if must(vm.SignalMSI(0xfee00000|7<<12, 0x77))(t) || requested(0x77) {
		t.Error("an APIC took a message for another one")
	}
}

// After SetClock the clock continues from the new value.
func TestClock(t *testing.T) {
	vm := newVM(t)
	g := newRing3Guest(t, vm, 0x88, 0x01) // mov %al, (%rcx)
	g.next(t, ExitMMIO)                   // the kernel's master clock starts with a vCPU
	c := must(vm.GetClock())(t)
	t.Logf("clock %d ns, flags %#x", c.Clock, c.Flags)
	c.Clock += uint64(time.Hour)
	check(t, vm.SetClock(c)) // with flags that KVM_SET_CLOCK refuses
	if got := must(vm.GetClock())(t); got.Clock < c.Clock {
		t.Errorf("clock %d ns, set to %d", got.Clock, c.Clock)
	}
	if c.Flags&ClockRealtime != 0 {
		// A clock that was read a minute ago is set a minute later.
		c.Realtime -= uint64(time.Minute)
		check(t, vm.SetClock(c))
		if got := must(vm.GetClock())(t); got.Clock < c.Clock+uint64(time.Minute) {
			t.Errorf("clock %d ns, set to %d a minute ago", got.Clock, c.Clock)
		}
	}
}

func TestDefaultRoutesAreTheKernels(t *testing.T) {
	// All lines have the same effect after the default table is loaded.
	requests := func(load bool) []uint16 {
		vm := newVM(t)
		check(t, vm.CreateIRQChip())
		if load {
			check(t, vm.SetGSIRouting(vm.DefaultRoutes()))
		}
		var all []uint16
		for gsi := range uint32(IOAPICPins) {
			check(t, vm.IRQLine(gsi, true))
			ioapic := must(vm.GetIRQChip(ChipIOAPIC))(t)
			// struct kvm_ioapic_state: irr at offset 16.
			all = append(all, picIRR(t, vm), uint16(ioapic.Chip[16]), uint16(ioapic.Chip[17]), uint16(ioapic.Chip[18]))
		}
		return all
	}
	if got, want := requests(true), requests(false); !reflect.DeepEqual(got, want) {
		t.Errorf("requests with the table loaded\n%#x\nwithout\n%#x", got, want)
	}
}
