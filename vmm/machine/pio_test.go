package machine

import (
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

const (
	counterPort = 0x1000
	counterMMIO = 0xe8000000
	readsAt     = 0x200000
	readsTotal  = 20000
)

// Guests that read a device 20,000 times, store what they read one after
// another at readsAt, and power off.
var (
	readDone = []byte{
		0x66, 0xba, 0x04, 0x06, // mov $0x604,%dx
		0x66, 0xb8, 0x00, 0x20, // mov $0x2000,%ax
		0x66, 0xef, // out %ax,(%dx)
	}
	readPort = append([]byte{
		0xbf, 0x00, 0x00, 0x20, 0x00, // mov $0x200000,%edi
		0xb9, 0x20, 0x4e, 0x00, 0x00, // mov $20000,%ecx
		0x66, 0xba, 0x00, 0x10, // mov $0x1000,%dx
		0xed,       // in (%dx),%eax
		0xab,       // stos %eax,%es:(%edi)
		0xe2, 0xfc, // loop
	}, readDone...)
	readPortString = append([]byte{
		0xbf, 0x00, 0x00, 0x20, 0x00, // mov $0x200000,%edi
		0x66, 0xba, 0x00, 0x10, // mov $0x1000,%dx
		0xbb, 0x90, 0x01, 0x00, 0x00, // mov $400,%ebx
		0xb9, 0x32, 0x00, 0x00, 0x00, // mov $50,%ecx
		0xf3, 0x6d, // rep insl (%dx),%es:(%edi)
		0x4b,       // dec %ebx
		0x75, 0xf6, // jne
	}, readDone...)
	readMemory = append([]byte{
		0xbf, 0x00, 0x00, 0x20, 0x00, // mov $0x200000,%edi
		0xb9, 0x20, 0x4e, 0x00, 0x00, // mov $20000,%ecx
		0xa1, 0x00, 0x00, 0x00, 0xe8, // mov 0xe8000000,%eax
		0xab,       // stos %eax,%es:(%edi)
		0xe2, 0xf8, // loop
	}, readDone...)
)

var readers = map[string][]byte{"in": readPort, "rep ins": readPortString, "mov from a device": readMemory}

func newReader(t *testing.T, code []byte, dev *counter) *Machine {
	t.Helper()
	m := newMachine(t, 1, code, nil)
	plug(t, m, dev)
	return m
}

func plug(t *testing.T, m *Machine, dev *counter) {
	t.Helper()
	check(t, m.board.ports.Claim(counterPort, 4, dev))
	check(t, m.board.mmio.Claim(counterMMIO, 4, dev))
}

// checkReads checks that no read was lost or done twice.
func checkReads(t *testing.T, m *Machine, dev *counter) {
	t.Helper()
	if n := dev.count(); n != readsTotal {
		t.Errorf("the device was read %d times, not %d", n, readsTotal)
	}
	for i := range uint32(readsTotal) {
		if got := word(t, m, readsAt+4*uint64(i)); got != i {
			t.Fatalf("read %d gave %d", i, got)
		}
	}
}

// TestPauseCompletesAccesses pauses a guest that reads a device all the time, again and
// again (R5): when the machine is paused, each read that the device has answered is
// complete.
func TestPauseCompletesAccesses(t *testing.T) {
	for name, code := range readers {
		t.Run(name, func(t *testing.T) {
			dev := &counter{}
			m := newReader(t, code, dev)
			check(t, m.Start(false))
			pauses := 0
			for ; pauses < 3000 && m.Pause(t.Context()) == nil; pauses++ {
				regs, err := m.vcpus[0].kvm.GetRegs()
				check(t, err)
				read := dev.count()
				stored := uint32(max(regs.RDI, readsAt)-readsAt) / 4 // RDI is 0 at first
				// A value read may still be in EAX. A string instruction has
				// stored all.
				if inEAX := read - stored; inEAX > 1 || inEAX == 1 && (name == "rep ins" || uint32(regs.RAX) != read-1) {
					t.Fatalf("the device was read %d times, %d are in memory, EAX is %#x", read, stored, regs.RAX)
				}
				for i := uint32(max(int(stored)-60, 0)); i < stored; i++ {
					if got := word(t, m, readsAt+4*uint64(i)); got != i {
						t.Fatalf("read %d gave %d", i, got)
					}
				}
				if m.Resume() != nil {
					break
				}
			}
			if exit := wait(t, m); exit.Kind != ExitPowerOff {
				t.Fatalf("the guest %v: %v", exit.Kind, exit.Err)
			}
			t.Logf("%d pauses", pauses)
			checkReads(t, m, dev)
		})
	}
}

// TestMoveBetweenAccesses moves that guest from machine to machine while it reads. No
// read is lost, and none is done twice.
func TestMoveBetweenAccesses(t *testing.T) {
	for name, code := range readers {
		t.Run(name, func(t *testing.T) {
			dev := &counter{}
			m := newReader(t, code, dev)
			check(t, m.Start(false))
			moves := 0
			for ; ; moves++ {
				// Each machine reads at least once.
				for was := dev.count(); dev.count() == was && !ended(m); {
					time.Sleep(10 * time.Microsecond)
				}
				if m.Pause(t.Context()) != nil || moves == 20 {
					break
				}
				next := handOn(t, m, func(peer *Machine) { plug(t, peer, dev) })
				check(t, next.Start(false))
				m = next
			}
			_ = m.Resume() // it may have ended
			if exit := wait(t, m); exit.Kind != ExitPowerOff {
				t.Fatalf("the guest %v: %v", exit.Kind, exit.Err)
			}
			t.Logf("%d moves", moves)
			checkReads(t, m, dev)
		})
	}
}

func ended(m *Machine) bool {
	select {
	case <-m.Done():
		return true
	default:
		return false
	}
}

// handOn makes another machine from the spec, memory and encoded state of one that
// is paused, and closes that.
func handOn(t *testing.T, m *Machine, before func(*Machine)) *Machine {
	t.Helper()
	state, err := m.saveState()
	check(t, err)
	b, err := encodeState(state)
	check(t, err)
	peer := fromSpec(t, m.Spec(), nil)
	if before != nil {
		before(peer)
	}
	copyMemory(t, peer, m)
	check(t, m.Close())
	state, err = decodeState(b)
	check(t, err)
	check(t, peer.loadState(state))
	return peer
}

// copyMemory copies all pages that hold data.
func copyMemory(t *testing.T, to, from *Machine) {
	t.Helper()
	for i, s := range from.Memory().Slots() {
		pages := s.Size / mempage.Size
		populated := make([]uint64, (pages+63)/64)
		check(t, from.Memory().Populated(i, 0, pages, populated))
		for p := range pages {
			if populated[p/64]&(1<<(p%64)) != 0 {
				copy(to.Memory().SlotBytes(i, p, 1), from.Memory().SlotBytes(i, p, 1))
			}
		}
	}
}
