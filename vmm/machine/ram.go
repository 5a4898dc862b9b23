package machine

import (
	"errors"
	"time"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/memory"
)

// guestRAM is the machine's memory as package migrate uses it, at both ends.
type guestRAM struct{ *memory.Memory }

// Slots lists the slots in pages.
func (r guestRAM) Slots() []migrate.Slot {
	slots := r.Memory.Slots()
	out := make([]migrate.Slot, len(slots))
	for i, s := range slots {
		out[i] = migrate.Slot{GPA: s.GPA, Pages: s.Size / mempage.Size}
	}
	return out
}

// Bytes returns memory itself, see [migrate.RAM].
func (r guestRAM) Bytes(slot int, first, n uint64) []byte { return r.SlotBytes(slot, first, n) }

// StartDirtyLog turns logging on. With KVM_DIRTY_LOG_INITIALLY_SET, which was
// enabled when the VM was made, every page then counts as dirty, and is
// write-protected when it is cleared, not now. With rings every page is
// write-protected here, and none counts as dirty.
func (s *source) StartDirtyLog() error {
	if s.kernel.rings != nil {
		if err := s.kernel.rings.drop(); err != nil {
			return err
		}
	}
	return s.setSlots(kvm.MemLogDirtyPages)
}

// StopDirtyLog turns logging off.
func (s *source) StopDirtyLog() error {
	err := s.setSlots(0)
	if s.kernel.rings != nil {
		err = errors.Join(err, s.kernel.rings.drop())
	}
	return err
}

// FetchDirtyLog reads KVM's log of a slot, see [migrate.DirtyLog].
// With rings the vCPUs leave the guest once before: processors that
// buffer what was written (Intel's PML) hand it over then.
func (s *source) FetchDirtyLog(slot int, bitmap []uint64) error {
	if s.kernel.rings != nil {
		s.gate.flush(flushTime)
		return s.kernel.rings.fetch(slot, bitmap)
	}
	return s.kernel.vm.GetDirtyLog(uint32(slot), bitmap)
}

// ClearDirtyLog clears bits of KVM's log, see [migrate.DirtyLog].
func (s *source) ClearDirtyLog(slot int, first, n uint64, bitmap []uint64) error {
	return s.kernel.vm.ClearDirtyLog(uint32(slot), first, uint32(n), bitmap)
}

// flushTime bounds the wait for vCPUs to leave the guest. Only the last fetch needs
// all of them out, and then they stand still. A vCPU may be waiting for something
// that the migration holds.
const flushTime = 10 * time.Millisecond

// ManualProtect says whether the kernel leaves clearing the dirty log to
// KVM_CLEAR_DIRTY_LOG (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
func (m *Machine) ManualProtect() bool { return m.kernel.caps.dirtyLog&kvm.DirtyLogManualProtect != 0 }

// FetchVMMDirty takes the pages that this process wrote, see
// [migrate.DirtyLog].
func (s *source) FetchVMMDirty(slot int, each func(w int, word uint64)) error {
	return s.mem.FetchDirty(slot, each)
}
