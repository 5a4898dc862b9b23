package machine

import (
	"encoding/binary"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/testhook"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/vmm/loader"
)

// prefillWord is what prefilled memory consists of, little-endian: the first
// byte that is not zero rules out a zero page at once.
const prefillWord = 0x9e3779b97f4a7c15

// prefill does what [testhook.Prefill] asks for: it writes a pattern to all RAM from
// 1 MiB up, once. Below are the firmware's tables and the boot parameters, which a
// guest may look for. It returns whether memory is no longer zero.
func (m *Machine) prefill() bool {
	testhook.Prefill.Store(false)
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
	if b, ok := deviceOf[*balloon.Balloon](m); ok {
		b.KeepReported()
	}
	return true
}
