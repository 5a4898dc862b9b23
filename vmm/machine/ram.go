package machine

import (
	"errors"
	"time"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/memory"
)

var (
	_ migrate.BulkLog    = (*source)(nil)
	_ migrate.HoleFinder = (*source)(nil)
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

// sparseShare: a slot of which no more than one page of so many is populated is
// write-protected when its log starts. The work is for the pages that the guest has mapped,
// where clearing the bits of a full log is work for every page that the slot has.
const sparseShare = 64

// StartDirtyLog turns logging on. With KVM_DIRTY_LOG_INITIALLY_SET, which was
// enabled when the VM was made, every page then counts as dirty, and is
// write-protected when it is cleared, not now. With rings, and in slots that are mostly
// holes, every page is write-protected here, and none counts as dirty.
func (s *source) StartDirtyLog() error {
	if s.kernel.rings != nil {
		if err := s.kernel.rings.drop(); err != nil {
			return err
		}
		return s.setSlots(kvm.MemLogDirtyPages)
	}
	slots, flags := s.mem.Slots(), s.kernel.caps.dirtyLog
	sparse := make([]bool, len(slots))
	for i, slot := range slots {
		var err error
		if sparse[i], err = s.mem.AtMostPopulated(i, slot.Size/mempage.Size/sparseShare); err != nil {
			return err
		}
	}
	for i := range slots {
		s.kernel.untouched[i].Store(sparse[i]) // TakeDirtyLog looks closer
	}
	manualProtect := func(flags int) error {
		if s.kernel.caps.dirtyLog&kvm.DirtyLogInitiallySet == 0 {
			return nil
		}
		return s.kernel.vm.EnableCap(kvm.CapManualDirtyLogProtect2, uint64(flags))
	}
	start := func(which bool) error {
		for i, slot := range slots {
			if sparse[i] == which {
				if err := s.setSlot(i, slot, kvm.MemLogDirtyPages); err != nil {
					return err
				}
			}
		}
		return nil
	}
	// KVM looks at INITIALLY_SET when a slot's log starts. A CLEAR splits huge pages only
	// while it is set.
	err := manualProtect(flags &^ kvm.DirtyLogInitiallySet)
	if err == nil {
		err = start(true)
	}
	if err = errors.Join(err, manualProtect(flags)); err == nil {
		err = start(false)
	}
	return err
}

// StopDirtyLog turns logging off.
func (s *source) StopDirtyLog() error {
	err := s.setSlots(0)
	if s.kernel.rings != nil {
		err = errors.Join(err, s.kernel.rings.drop())
	}
	for i := range s.kernel.untouched {
		s.kernel.untouched[i].Store(false)
	}
	return err
}

// BeginSync collects from the rings, for all slots, see [migrate.BulkLog]. The vCPUs leave
// the guest once before: processors that buffer what was written (Intel's PML) hand it
// over then.
func (s *source) BeginSync() error {
	if s.kernel.rings == nil {
		return nil
	}
	s.gate.flush(flushTime)
	return s.kernel.rings.collect()
}

// TakeDirtyLog knows the words of a slot's log if the log is in rings, or if the log does
// not matter: no page of the slot is populated now, and none was when anybody looked since
// the log was started. So nothing of the slot was sent but holes, and it is all holes: the
// destination has what is here, whatever was written and punched out in between.
func (s *source) TakeDirtyLog(slot int, each func(w int, word uint64)) (done bool, err error) {
	if s.kernel.rings != nil {
		return true, s.kernel.rings.take(slot, each)
	}
	if slot < 0 || slot >= len(s.kernel.untouched) || !s.kernel.untouched[slot].Load() {
		return false, nil
	}
	done, err = s.mem.AtMostPopulated(slot, 0)
	if !done {
		s.kernel.untouched[slot].Store(false)
	}
	return done, err
}

// Populated looks for populated pages, see [migrate.RAM].
func (s *source) Populated(slot int, first, n uint64, bitmap []uint64) error {
	err := s.mem.Populated(slot, first, n, bitmap)
	for _, word := range bitmap[:min(mempage.Words(n), uint64(len(bitmap)))] {
		if word != 0 {
			s.kernel.untouched[slot].Store(false)
			break
		}
	}
	return err
}

// NextPopulated looks for the next populated page, see [migrate.HoleFinder].
func (s *source) NextPopulated(slot int, first, n uint64) (page uint64, err error) {
	page, err = s.mem.NextPopulated(slot, first, n)
	if err == nil && page < first+n {
		s.kernel.untouched[slot].Store(false)
	}
	return page, err
}

// FetchDirtyLog reads KVM's log of a slot, see [migrate.DirtyLog].
func (s *source) FetchDirtyLog(slot int, bitmap []uint64) error {
	if s.kernel.rings != nil {
		clear(bitmap)
		return s.kernel.rings.take(slot, func(w int, word uint64) { bitmap[w] = word })
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
