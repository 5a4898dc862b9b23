package vmm

import (
	"encoding/binary"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/vmm/loader"
)

// prefillWord is what prefilled memory consists of, little-endian: the first
// byte that is not zero rules out a zero page at once.
const prefillWord = 0x9e3779b97f4a7c15

// prefill does what [Config.Prefill] asks for: it writes a pattern to all RAM
// from 1 MiB up. Below it the firmware's tables and the boot parameters are,
// which a guest may look for. The guest does not run yet.
func (m *Machine) prefill() {
	var page [mempage.Size]byte
	for at := 0; at < len(page); at += 8 {
		binary.LittleEndian.PutUint64(page[at:], prefillWord)
	}
	for i, s := range m.mem.Slots() {
		for n := range s.Size / mempage.Size {
			if s.GPA+n*mempage.Size >= loader.HighRAM {
				copy(m.mem.SlotBytes(i, n, 1), page[:])
			}
		}
	}
	m.stale = true
	if m.balloon != nil {
		m.balloon.KeepReported()
	}
}
