package kvm

import (
	"encoding/binary"
	"errors"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Guest physical addresses of the test guests.
const (
	codeAt  = 0x1000
	pml4At  = 0x2000
	pdptAt  = 0x3000
	pdAt    = 0x4000
	lowSize = 0x10000
	// dataAt is slot 1's address.
	dataAt = 0x100000
	// nowhere is mapped by the page tables, but in no slot: accesses exit.
	nowhere = 0x3000_0000
)

// testGuest is a VM of one vCPU with 64 KiB of memory in slot 0.
type testGuest struct {
	*VCPU
	vm  *VM
	low []byte // slot 0, at address 0
}

func newGuest(t testing.TB, vm *VM, code []byte) *testGuest {
	t.Helper()
	g := &testGuest{vm: vm, low: mapMemory(t, lowSize)}
	copy(g.low[codeAt:], code)
	check(t, vm.SetUserMemoryRegion(MemorySlot{Slot: 0, Size: lowSize, HVA: addressOf(g.low)}))
	g.VCPU = newVCPU(t, vm)
	return g
}

func addressOf(mem []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(mem))) }

// newRealModeGuest makes a guest that starts at codeAt in real mode.
func newRealModeGuest(t testing.TB, vm *VM, code ...byte) *testGuest {
	t.Helper()
	g := newGuest(t, vm, code)
	s := must(g.GetSregs())(t)
	s.CS.Base, s.CS.Selector = 0, 0
	check(t, g.SetSregs(s))
	check(t, g.SetRegs(Regs{RIP: codeAt, RFLAGS: 2, RSP: 0xf000}))
	return g
}

// newRing3Guest makes a guest that starts at codeAt in ring 3 of long mode, with the
// first GiB identity-mapped for ring 3. A KVM that emulates ring 0 runs it natively,
// so the processor does the writes.
func newRing3Guest(t testing.TB, vm *VM, code ...byte) *testGuest {
	t.Helper()
	const flags = 0x67 // present, writable, user, accessed, dirty
	g := newGuest(t, vm, code)
	binary.LittleEndian.PutUint64(g.low[pml4At:], pdptAt|flags)
	binary.LittleEndian.PutUint64(g.low[pdptAt:], pdAt|flags)
	for i := range uint64(512) {
		binary.LittleEndian.PutUint64(g.low[pdAt+8*i:], i<<21|flags|1<<7)
	}
	s := must(g.GetSregs())(t)
	s.CR3 = pml4At
	s.CR4 |= 1<<5 | 1<<9   // PAE, OSFXSR
	s.CR0 = 0x8005_0033    // PG, AM, WP, NE, ET, MP, PE
	s.EFER |= 1<<8 | 1<<10 // LME, LMA
	s.CS = Segment{Selector: 0x33, Limit: 0xffffffff, Type: 11, Present: 1, DPL: 3, S: 1, L: 1, G: 1}
	data := Segment{Selector: 0x2b, Limit: 0xffffffff, Type: 3, Present: 1, DPL: 3, S: 1, DB: 1, G: 1}
	s.SS, s.DS, s.ES, s.FS, s.GS = data, data, data, data, data
	s.TR = Segment{Selector: 0x40, Limit: 0x67, Type: 11, Present: 1}
	check(t, g.SetSregs(s))
	check(t, g.SetRegs(Regs{RIP: codeAt, RFLAGS: 2, RCX: nowhere}))
	return g
}

// next runs the guest to its next exit and checks the reason.
func (g *testGuest) next(t testing.TB, want ExitReason) {
	t.Helper()
	for {
		err := g.Run()
		if errors.Is(err, unix.EINTR) {
			continue // a signal of the Go runtime
		}
		check(t, err)
		if got := g.ExitReason(); got != want {
			text := ""
			if got == ExitInternalError {
				text = g.InternalError().String()
			}
			t.Fatalf("exit %v %s, want %v; at %#x", got, text, want, must(g.GetRegs())(t).RIP)
		}
		return
	}
}

// complete finishes the port or MMIO access of the last exit without entering
// the guest.
func (g *testGuest) complete(t testing.TB) {
	t.Helper()
	g.SetImmediateExit(true)
	defer g.SetImmediateExit(false)
	if err := g.Run(); !errors.Is(err, unix.EINTR) {
		t.Fatalf("Run with immediate exit: %v, exit %v", err, g.ExitReason())
	}
}
