package vmm

import (
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/memory"
)

// guestRAM is the machine's memory as package migrate wants it, for both ends.
type guestRAM struct{ *memory.Memory }

// Slots lists the slots in pages.
func (r guestRAM) Slots() []migrate.Slot {
	slots := r.Memory.Slots()
	out := make([]migrate.Slot, len(slots))
	for i, s := range slots {
		out[i] = migrate.Slot{GPA: s.GPA, Pages: s.Size / memory.PageSize}
	}
	return out
}

// Bytes returns memory itself, see [migrate.RAM].
func (r guestRAM) Bytes(slot int, first, n uint64) []byte { return r.SlotBytes(slot, first, n) }

// StartDirtyLog turns logging on. With KVM_DIRTY_LOG_INITIALLY_SET, which was
// enabled when the VM was made, every page then counts as dirty, and is
// write-protected when it is cleared, not now.
func (m *Machine) StartDirtyLog() error { return m.setSlots(kvm.MemLogDirtyPages) }

// StopDirtyLog turns logging off.
func (m *Machine) StopDirtyLog() error { return m.setSlots(0) }

// FetchDirtyLog reads KVM's log of a slot, see [migrate.DirtyLog].
func (m *Machine) FetchDirtyLog(slot int, bitmap []uint64) error {
	return m.vm.GetDirtyLog(uint32(slot), bitmap)
}

// ClearDirtyLog clears bits of KVM's log, see [migrate.DirtyLog].
func (m *Machine) ClearDirtyLog(slot int, first, n uint64, bitmap []uint64) error {
	return m.vm.ClearDirtyLog(uint32(slot), first, uint32(n), bitmap)
}

// ManualProtect says whether the kernel leaves clearing to ClearDirtyLog.
func (m *Machine) ManualProtect() bool { return m.caps.dirtyLog&kvm.DirtyLogManualProtect != 0 }

// FetchVMMDirty takes the pages that this process wrote, see
// [migrate.DirtyLog].
func (m *Machine) FetchVMMDirty(slot int, bitmap []uint64) error {
	return m.mem.FetchDirty(slot, bitmap)
}
