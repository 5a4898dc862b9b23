package machine

import (
	"fmt"
	"sync/atomic"
)

// step is what the end of a machine has just begun, for who asks why it takes so long.
type step struct{ now atomic.Pointer[string] }

func (s *step) begin(what string) { s.now.Store(&what) }

// Awaits says what the end of the machine waits for, in a few words such as "disk a.img: the
// requests that it has begun". freeing is set if it is nothing but memory that is given back
// to the host. It waits for nobody, whatever hangs.
func (m *Machine) Awaits() (what string, freeing bool) {
	select {
	case <-m.ending.done:
	default:
		return m.awaitedVCPU(), false
	}
	if now := m.ending.step.now.Load(); now != nil {
		return *now, *now == stepMemory
	}
	return "its devices", false
}

// stepMemory is the last step: nothing that has a name on this host is left.
const stepMemory = "guest memory"

// awaitedVCPU names a vCPU that does not come to its end.
func (m *Machine) awaitedVCPU() string {
	for _, c := range m.vcpus {
		addr := c.at.Load()
		if addr == 0 {
			continue
		}
		name := "a device"
		if slot, ok := m.board.pci.SlotAt(addr); ok && slot > 0 && slot <= len(m.devices.plugged) {
			name = m.devices.plugged[slot-1].name
		}
		return fmt.Sprintf("%s: an access of vCPU %d to its register at %#x", name, c.kvm.ID(), addr)
	}
	return "a vCPU that does not leave the guest"
}
