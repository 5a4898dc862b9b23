package machine

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/cpu"
)

// MSRs that package cpu treats in their own way.
const (
	msrWallClockOld = 0x11
	msrTSCDeadline  = 0x6e0
	msrKVMWallClock = 0x4b564d00
)

// still clears what changes with time in a state, so that two states that were saved one
// after the other can be compared.
func still(s *machineState) *machineState {
	const (
		currentCount = 0x390 // APIC register (Intel SDM volume 3, 11.4.1)
	)
	out := *s
	out.Clock.KVM, out.Clock.KVMRealtime = kvm.ClockData{}, 0
	out.Clock.TSC, out.Clock.TSCRealtime = 0, 0
	out.VCPUs = slices.Clone(s.VCPUs)
	for i := range out.VCPUs {
		clear(out.VCPUs[i].LAPIC.Regs[currentCount : currentCount+4])
	}
	for i := range out.Chips.PIT.Channels {
		out.Chips.PIT.Channels[i].CountLoadTime = 0
	}
	return &out
}

func same(t *testing.T, what string, a, b any) {
	t.Helper()
	if reflect.DeepEqual(a, b) {
		return
	}
	va, vb := reflect.ValueOf(a), reflect.ValueOf(b)
	for va.Kind() == reflect.Pointer && !va.IsNil() && !vb.IsNil() {
		va, vb = va.Elem(), vb.Elem()
	}
	switch va.Kind() {
	case reflect.Struct:
		for i := range va.NumField() {
			if f := va.Type().Field(i); f.IsExported() {
				same(t, what+"."+f.Name, va.Field(i).Interface(), vb.Field(i).Interface())
			}
		}
	default:
		if va.Kind() == reflect.Slice && va.Type().Elem().Kind() == reflect.Struct && va.Len() == vb.Len() {
			for i := range va.Len() {
				same(t, what, va.Index(i).Interface(), vb.Index(i).Interface())
			}
			return
		}
		t.Errorf("%s: %+v became %+v", what, a, b)
	}
}

// TestStateRoundTrip: a machine that has loaded a state saves an equal one, and its
// guest goes on, on both vCPUs, where it stood still.
func TestStateRoundTrip(t *testing.T) {
	m := newCounting(t)
	for i := range 5 {
		check(t, m.Pause(t.Context()))
		before, err := m.saveState()
		check(t, err)
		bsp, ap := word(t, m, vmtest.CountAt), word(t, m, vmtest.APCountAt)
		tsc := word64(t, m, vmtest.TSCAt)

		m = handOn(t, m, nil)
		if i == 0 { // later states differ: KVM has written pages of the guest meanwhile
			after, err := m.saveState()
			check(t, err)
			same(t, "state", still(before), still(after))
		}
		if word(t, m, vmtest.CountAt) != bsp || word(t, m, vmtest.APCountAt) != ap {
			t.Fatal("memory changed before the start")
		}
		check(t, m.Start(false))
		awaitChange(t, m, vmtest.CountAt, bsp)
		awaitChange(t, m, vmtest.APCountAt, ap)
		awaitChange(t, m, vmtest.CountAt, word(t, m, vmtest.CountAt))
		check(t, m.Pause(t.Context()))
		now := word64(t, m, vmtest.TSCAt)
		if now <= tsc {
			t.Errorf("the guest's TSC went from %d to %d", tsc, now)
		}
		if n := word(t, m, vmtest.CountAt); n < bsp || n-bsp > 1<<30 {
			t.Errorf("the guest counted from %d to %d", bsp, n)
		}
		check(t, m.Resume())
	}
}

// TestStateOfWaiting: a vCPU that waits for SIPI does so in the machine that loads its
// state, and can be started there.
func TestStateOfWaiting(t *testing.T) {
	// Wait until the word at 0x200020 is not 0, then wake the other vCPU.
	code := append([]byte{
		0x83, 0x3d, 0x20, 0x00, 0x20, 0x00, 0x00, // cmpl $0,0x200020
		0x74, 0xf7, // je back
	}, vmtest.WakeAndCount...)
	m := newMachine(t, 2, code, nil)
	check(t, m.Memory().WriteAt(vmtest.APCount, vmtest.APCodeAt))
	check(t, m.Start(false))
	check(t, m.Pause(t.Context()))
	m = handOn(t, m, nil)
	check(t, m.Start(true))
	state, err := m.saveState()
	check(t, err)
	if got := state.VCPUs[1].MPState; got != kvm.MPUninitialized {
		t.Fatalf("vCPU 1 is %v", got)
	}
	check(t, m.Resume())
	if n := word(t, m, vmtest.APCountAt); n != 0 {
		t.Fatalf("vCPU 1 has counted to %d", n)
	}
	check(t, m.Memory().WriteAt([]byte{1, 0, 0, 0}, 0x200020))
	awaitChange(t, m, vmtest.APCountAt, 0)
	awaitChange(t, m, vmtest.CountAt, 0)
}

// TestStateRules: when a state can be saved and loaded.
func TestStateRules(t *testing.T) {
	m := newMachine(t, 1, vmtest.JustCount, nil)
	state, err := m.saveState()
	check(t, err) // it stands still
	check(t, m.Start(false))
	if _, err := m.saveState(); !errors.Is(err, ErrRunning) {
		t.Errorf("saving a running machine: %v", err)
	}
	check(t, m.Pause(t.Context()))
	if err := m.loadState(state); !errors.Is(err, ErrStarted) {
		t.Errorf("loading a started machine: %v", err)
	}
	for name, c := range map[string]struct {
		spoil func(*machineState)
		says  string
	}{
		"version":       {func(s *machineState) { s.Version++ }, "machine state: expected version 1, found 2"},
		"vCPUs":         {func(s *machineState) { s.VCPUs = append(s.VCPUs, s.VCPUs[0]) }, "machine state: expected 1 vCPUs, found 2"},
		"no vCPU":       {func(s *machineState) { s.VCPUs = nil }, "machine state: expected 1 vCPUs, found 0"},
		"vCPU's id":     {func(s *machineState) { s.VCPUs[0].ID = 7 }, "expected vCPU 0, found 7"},
		"no segments":   {func(s *machineState) { s.VCPUs[0].Sregs2 = nil }, "no segments"},
		"chip":          {func(s *machineState) { s.Chips.PICSlave.ChipID = 2 }, "expected interrupt chip 1, found 2"},
		"MSR":           {func(s *machineState) { s.VCPUs[0].MSRs[0] = kvm.MSR{Index: msrKVMWallClock, Data: 5} }, "vCPU 0: MSR 0x4b564d00: is 0x5 in the guest, and this host would not have saved it"},
		"unknown MSR":   {func(s *machineState) { s.VCPUs[0].MSRs[0] = kvm.MSR{Index: 0x12345678, Data: 5} }, "MSR 0x12345678: is 0x5 in the guest, and this host would not have saved it"},
		"an MSR twice":  {func(s *machineState) { s.VCPUs[0].MSRs[0] = s.VCPUs[0].MSRs[1] }, "is there twice"},
		"mode of PIT":   {func(s *machineState) { s.Chips.PIT.Channels[2].Mode = 8 }, "channel 2 of the PIT"},
		"count of PIT":  {func(s *machineState) { s.Chips.PIT.Channels[0].Count = 0x10001 }, "channel 0 of the PIT"},
		"flags of PIT":  {func(s *machineState) { s.Chips.PIT.Flags = 4 }, "flags 0x4 of the PIT"},
		"TSC":           {func(s *machineState) { s.Clock.TSCKHz *= 2 }, "the TSC runs at"},
		"XSAVE":         {func(s *machineState) { s.VCPUs[0].XSAVE = bytes.Repeat([]byte{1}, 1<<16) }, "KVM_SET_XSAVE"},
		"serial port":   {func(s *machineState) { s.Serial.FIFO = make([]byte, 99) }, "serial port state"},
		"wrong segment": {func(s *machineState) { s.VCPUs[0].Sregs2.CR0 = 1 << 31 }, "KVM_SET_SREGS2"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := encodeState(state)
			check(t, err)
			spoilt, err := decodeState(b)
			check(t, err)
			c.spoil(spoilt)
			peer := fromSpec(t, m.Spec(), nil)
			if err := peer.loadState(spoilt); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one with %q", err, c.says)
			}
		})
	}
}

// TestMSRs: the error names an MSR that differs and cannot be set, with both values. An
// MSR that cannot be set and has the right value is no error.
func TestMSRs(t *testing.T) {
	m := newMachine(t, 1, vmtest.JustCount, nil)
	v := m.vcpus[0].kvm
	list, err := cpu.ReadMSRs(v, m.kernel.msrs)
	check(t, err)
	check(t, cpu.LoadMSRs(v, m.spec.CPUID, m.kernel.msrs, list))
	// MTRRcap can be read and not set on any KVM.
	fixed, err := v.GetMSRs([]uint32{0xfe})
	check(t, err)
	i := len(list)
	list = append(list, fixed...)
	was := list[i].Data
	list[i].Data = ^uint64(0)
	check(t, cpu.LoadMSRs(v, m.spec.CPUID, m.kernel.msrs, list)) // it is none of them
	err = cpu.LoadMSRs(v, m.spec.CPUID, append(slices.Clone(m.kernel.msrs), 0xfe), list)
	if err == nil || !strings.Contains(err.Error(), "vCPU 0: MSR 0xfe: expected 0xffffffffffffffff as in the guest, found ") {
		t.Errorf("an MSR that cannot be set (it was %#x): %v", was, err)
	}
	for _, n := range []uint32{cpu.MSRTSC, msrWallClockOld, msrKVMWallClock, 0x480, 0x40000020} {
		if slices.Contains(m.kernel.msrs, n) {
			t.Errorf("MSR %#x travels", n)
		}
	}
}

// TestInvisibleStateIsLoaded: MSRs and XSAVE components that the guest's CPUID does not
// show do not keep a guest from loading. Those that it shows do.
func TestInvisibleStateIsLoaded(t *testing.T) {
	m := newMachine(t, 1, vmtest.JustCount, nil)
	s, err := m.saveState()
	check(t, err)
	const perfCapabilities, tscRatio, component = 0x345, 0xc0000104, 62 // which no processor has
	v := &s.VCPUs[0]
	v.MSRs = slices.DeleteFunc(v.MSRs, func(m kvm.MSR) bool { return m.Index == perfCapabilities || m.Index == tscRatio })
	v.MSRs = append(v.MSRs, kvm.MSR{Index: perfCapabilities, Data: 1 << 63}, kvm.MSR{Index: tscRatio, Data: 1<<63 | 5})
	v.XSAVE[512+component/8] |= 1 << (component % 8)
	spec := m.Spec()
	spec.CPUID = slices.Clone(spec.CPUID)
	shown := func(on bool) {
		for i, e := range spec.CPUID {
			switch bit := uint32(1 << 15); {
			case e.Function == 1 && on:
				spec.CPUID[i].Ecx |= bit
			case e.Function == 1:
				spec.CPUID[i].Ecx &^= bit
			case e.Function == 0x8000000a:
				spec.CPUID[i].Edx &^= 1 << 4
			}
		}
	}
	shown(false)
	check(t, fromSpec(t, spec, nil).loadState(s))
	shown(true)
	if err := fromSpec(t, spec, nil).loadState(s); err == nil || !strings.Contains(err.Error(), "MSR 0x345 (PERF_CAPABILITIES): expected 0x8000000000000000 as in the guest") {
		t.Errorf("an MSR that the guest knows: %v", err)
	}
}

// TestEventsOfOtherKernels: events that a kernel cannot load are left out if none of
// them is pending.
func TestEventsOfOtherKernels(t *testing.T) {
	old := &Machine{}
	for _, c := range []struct {
		e  kvm.VCPUEvents
		ok bool
	}{
		{kvm.VCPUEvents{Flags: kvm.EventPayload | kvm.EventTripleFault | kvm.EventShadow}, true},
		{kvm.VCPUEvents{Flags: kvm.EventTripleFault, TripleFault: 1}, false},
		{kvm.VCPUEvents{Flags: kvm.EventPayload, ExceptionHasPayload: 1}, false},
		{kvm.VCPUEvents{Flags: kvm.EventPayload, Exception: kvm.EventException{Pending: 1}}, false},
	} {
		got, err := old.events(&vcpuState{Events: c.e})
		if (err == nil) != c.ok {
			t.Errorf("%+v: %v", c.e, err)
		}
		if c.ok && got.Flags != kvm.EventShadow {
			t.Errorf("flags %#x", got.Flags)
		}
		if got, err := (&Machine{kernel: kernel{caps: caps{tripleFault: true, exceptionPayload: true}}}).events(&vcpuState{Events: c.e}); err != nil || got != c.e {
			t.Errorf("changed for a kernel that can take it: %+v, %v", got, err)
		}
	}
}

// TestDecodeStateStrictly decodes what an untrusted peer might send.
func TestDecodeStateStrictly(t *testing.T) {
	good, err := encodeState(&machineState{Version: stateVersion, VCPUs: make([]vcpuState, 2)})
	check(t, err)
	if _, err := decodeState(good); err != nil {
		t.Fatal(err)
	}
	encode := func(v any) []byte {
		b, err := cbor.Marshal(v)
		check(t, err)
		return b
	}
	for name, b := range map[string][]byte{
		"nothing":         {},
		"text":            encode("hello"),
		"other version":   encode(map[string]any{"version": 2, "new": 1}),
		"unknown field":   encode(map[string]any{"version": 1, "new": 1}),
		"wrong type":      encode(map[string]any{"version": 1, "vcpus": "x"}),
		"field twice":     unhex(t, "a26776657273696f6e016776657273696f6e01"),
		"endless":         unhex(t, "bf6776657273696f6e01ff"),
		"too many":        encode(map[string]any{"version": 1, "vcpus": make([]int, 5000)}),
		"tagged":          unhex(t, "c1a16776657273696f6e01"),
		"cut":             good[:len(good)-1],
		"more":            append(slices.Clone(good), 0),
		"huge array":      unhex(t, "a26776657273696f6e016576637075739b7fffffffffffffff"),
		"negative number": encode(map[string]any{"version": 1, "reset_control": -1}),
	} {
		if s, err := decodeState(b); err == nil {
			t.Errorf("%s was decoded: %+v", name, s)
		}
	}
}

func unhex(t *testing.T, s string) []byte {
	b, err := hex.DecodeString(s)
	check(t, err)
	return b
}

// TestDirtyLog: where the kernel can, the first fetch reports every page. Later ones
// report what the guest wrote. Writes of this process are in a log of their own.
func TestDirtyLog(t *testing.T) {
	m := newCounting(t)
	src := m.Source()
	slots := src.Slots()
	if len(slots) != 1 || slots[0].GPA != 0 || slots[0].Pages != 4096 {
		t.Fatalf("slots %+v", slots)
	}
	log := make([]uint64, slots[0].Pages/64)
	check(t, src.StartDirtyLog())
	check(t, src.FetchDirtyLog(0, log))
	if m.ManualProtect() {
		if m.kernel.caps.dirtyLog&kvm.DirtyLogInitiallySet != 0 && slices.ContainsFunc(log, func(w uint64) bool { return w != ^uint64(0) }) {
			t.Error("not every page is dirty at first")
		}
		check(t, src.ClearDirtyLog(0, 0, slots[0].Pages, log))
	}
	bsp, ap := word(t, m, vmtest.CountAt), word(t, m, vmtest.APCountAt)
	awaitChange(t, m, vmtest.CountAt, bsp)
	awaitChange(t, m, vmtest.APCountAt, ap)
	check(t, m.Pause(t.Context()))
	check(t, src.FetchDirtyLog(0, log))
	var pages []int
	for p := range int(slots[0].Pages) {
		if log[p/64]&(1<<(p%64)) != 0 {
			pages = append(pages, p)
		}
	}
	// A KVM that shadows page tables may map a page writable for a read, and log it:
	// here those of the code. It logs all pages that were written, and no others.
	for _, p := range []int{vmtest.APCountAt >> 12, vmtest.CountAt >> 12} {
		if !slices.Contains(pages, p) {
			t.Errorf("the guest wrote page %#x, the log has %#x", p, pages)
		}
	}
	for _, p := range pages {
		if !slices.Contains([]int{vmtest.APCountAt >> 12, vmtest.CountAt >> 12, vmtest.APCodeAt >> 12, vmtest.CodeAt >> 12}, p) {
			t.Errorf("the guest did not use page %#x, the log has %#x", p, pages)
		}
	}

	own := make([]uint64, len(log))
	check(t, src.FetchVMMDirty(0, func(int, uint64) {})) // the loader's
	check(t, m.Memory().WriteAt([]byte{1, 0, 0, 0}, 0x5008))
	check(t, src.FetchVMMDirty(0, func(w int, word uint64) { own[w] = word }))
	if own[0] != 1<<5 || slices.ContainsFunc(own[1:], func(w uint64) bool { return w != 0 }) {
		t.Errorf("this process wrote %#x", own)
	}
	check(t, src.StopDirtyLog())
	check(t, src.StopDirtyLog())
	if err := src.FetchDirtyLog(0, log); err == nil {
		t.Error("a log that is off was fetched")
	}
}

// TestStateOfEverything sets every part of a machine to values that differ from the
// initial ones, and expects them in a machine that has loaded its state.
func TestStateOfEverything(t *testing.T) {
	m := newMachine(t, 2, vmtest.JustCount, nil)
	v := m.vcpus[1].kvm
	check(t, v.SetMPState(kvm.MPHalted))
	check(t, v.SetRegs(kvm.Regs{RAX: 1, RBX: 2, RCX: 3, RDX: 4, RSI: 5, RDI: 6, RSP: 7, RBP: 8, R8: 9, R9: 10, R10: 11, R11: 12,
		R12: 13, R13: 14, R14: 15, R15: 16, RIP: 17, RFLAGS: 0x246}))
	sregs, err := v.GetSregs()
	check(t, err)
	sregs.GDT = kvm.Descriptor{Base: 0x1234, Limit: 0x77}
	sregs.IDT = kvm.Descriptor{Base: 0x5678, Limit: 0x88}
	sregs.CR2, sregs.CR8 = 0xabcd, 5
	sregs.ES.Base, sregs.ES.Selector = 0x4560, 0x456
	check(t, v.SetSregs(sregs))
	check(t, v.SetDebugRegs(kvm.DebugRegs{DB: [4]uint64{0x10, 0x20, 0x30, 0x40}, DR6: 0xffff0ff0, DR7: 0x400}))
	xsave, err := v.GetXSAVE()
	check(t, err)
	xsave[512] |= 3 // XSTATE_BV: x87 and SSE
	for i := range 256 {
		xsave[160+i] = byte(i) // XMM0 to XMM15
	}
	check(t, v.SetXSAVE(xsave))
	lapic, err := v.GetLAPIC()
	check(t, err)
	lapic.Regs[0xf0], lapic.Regs[0xf1] = 0xff, 0x01 // SVR: on
	lapic.Regs[0x320] = 0x41                        // LVTT: one shot, vector 0x41
	lapic.Regs[0x322] |= 0x04                       // TSC deadline
	lapic.Regs[0x200+0x10*2] = 0x20                 // IRR: vector 0x45
	check(t, v.SetLAPIC(lapic))
	n, err := v.SetMSRs([]kvm.MSR{
		{Index: 0x174, Data: 0x10},                  // SYSENTER_CS
		{Index: 0x277, Data: 0x0007040600070400},    // PAT
		{Index: 0xc0000081, Data: 0x23001000000000}, // STAR
		{Index: 0xc0000082, Data: 0xffffffff81000000},
		{Index: 0xc0000102, Data: 0xffff888000000000}, // KERNEL_GS_BASE
		{Index: 0x4b564d01, Data: 0x3001},             // kvmclock
		{Index: 0x4b564d03, Data: 0x4001},             // steal time
		{Index: msrTSCDeadline, Data: 1 << 60},
		{Index: 0x3b, Data: 12345}, // TSC_ADJUST
	})
	if err != nil {
		t.Fatalf("%d MSRs: %v", n, err)
	}
	events, err := v.GetVCPUEvents()
	check(t, err)
	events.NMI.Masked, events.NMI.Pending = 1, 1
	check(t, v.SetVCPUEvents(events))

	m.board.ports.Write(portCOM1+1, []byte{0x02}) // IER: the line goes up, pending in PIC and IOAPIC
	pic, err := m.kernel.vm.GetIRQChip(kvm.ChipPICSlave)
	check(t, err)
	pic.Chip[2], pic.Chip[5] = 0xee, 0x70 // IMR, vector base
	check(t, m.kernel.vm.SetIRQChip(pic))
	ioapic, err := m.kernel.vm.GetIRQChip(kvm.ChipIOAPIC)
	check(t, err)
	ioapic.Chip[24+8*9] = 0x99 // pin 9: vector, still masked
	check(t, m.kernel.vm.SetIRQChip(ioapic))
	check(t, m.awaitTimer())
	pit, err := m.kernel.vm.GetPIT2()
	check(t, err)
	pit.Channels[2].Count, pit.Channels[2].Mode, pit.Channels[2].RWMode = 0x4321, 3, 3
	check(t, m.kernel.vm.SetPIT2(pit))
	for off, b := range []byte{3: 0x1b, 4: 0x0b, 7: 0x5a} { // LCR, MCR, SCR
		if b != 0 {
			m.board.ports.Write(portCOM1+uint64(off), []byte{b})
		}
	}
	m.board.ports.Write(portResetControl, []byte{0x02})

	before, err := m.saveState()
	check(t, err)
	for what, ok := range map[string]bool{
		"RIP":         before.VCPUs[1].Regs.RIP == 17,
		"MP state":    before.VCPUs[1].MPState == kvm.MPHalted,
		"kvmclock":    slices.Contains(before.VCPUs[1].MSRs, kvm.MSR{Index: 0x4b564d01, Data: 0x3001}),
		"deadline":    slices.Contains(before.VCPUs[1].MSRs, kvm.MSR{Index: msrTSCDeadline, Data: 1 << 60}),
		"NMI":         before.VCPUs[1].Events.NMI.Masked == 1,
		"PIC":         before.Chips.PICSlave.Chip[5] == 0x70,
		"IRQ 4":       before.Chips.PICMaster.Chip[1]&(1<<irqCOM1) != 0,
		"IOAPIC":      before.Chips.IOAPIC.Chip[24+8*9] == 0x99,
		"PIT":         before.Chips.PIT.Channels[2].Count == 0x4321,
		"serial port": before.Serial.SCR == 0x5a,
		"reset":       before.ResetControl == 0x02,
	} {
		if !ok {
			t.Errorf("%s was not set", what)
		}
	}
	peer := handOn(t, m, nil)
	after, err := peer.saveState()
	check(t, err)
	same(t, "state", still(before), still(after))
}

// TestRehearsedStateIsWhole: the state that is rehearsed can be encoded and decoded, and
// has an element of everything.
func TestRehearsedStateIsWhole(t *testing.T) {
	s := new(machineState)
	fill(reflect.ValueOf(s).Elem())
	s.Version = stateVersion
	b, err := encodeState(s)
	check(t, err)
	got, err := decodeState(b)
	check(t, err)
	if len(got.VCPUs) != 1 || len(got.VCPUs[0].MSRs) != 1 || len(got.Virtio.Devices) != 1 || len(got.Virtio.Devices[0].Queues) != 1 {
		t.Errorf("%+v", got)
	}
}
