package kvm

import (
	"runtime"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// MemLogDirtyPages is the flag of a [MemorySlot] whose writes are logged.
const MemLogDirtyPages = 1 << 0

// MemorySlot is a range of guest physical memory and where it is mapped in this
// process.
type MemorySlot struct {
	// Slot is the slot's number, below KVM_CAP_NR_MEMSLOTS.
	Slot uint32
	// Flags is 0 or MemLogDirtyPages.
	Flags uint32
	// GPA is the guest physical address and Size the length, in bytes, both
	// multiples of 4096.
	GPA, Size uint64
	// HVA is the address in this process. It must be mapped memory that Go's
	// allocator does not own, for as long as the slot is registered.
	HVA uintptr
}

// SetUserMemoryRegion creates a slot, changes its flags or address, or with Size
// 0 deletes it. The size of a slot cannot change: delete the slot first.
func (vm *VM) SetUserMemoryRegion(m MemorySlot) error {
	const op = "KVM_SET_USER_MEMORY_REGION"
	region := &gokvm.UserspaceMemoryRegion{
		Slot:          m.Slot,
		Flags:         m.Flags,
		GuestPhysAddr: m.GPA,
		MemorySize:    m.Size,
		UserspaceAddr: uint64(m.HVA),
	}
	vm.slotsMu.Lock()
	defer vm.slotsMu.Unlock()
	if _, err := vm.h.ioctl(reqSetUserMemoryRegion, unsafe.Pointer(region)); err != nil {
		return opError(err, op, "slot %d gpa [%#x,%#x) hva %#x flags %#x", m.Slot, m.GPA, m.GPA+m.Size, m.HVA, m.Flags)
	}
	if m.Size == 0 {
		delete(vm.slots, m.Slot)
	} else {
		vm.slots[m.Slot] = m.Size / mempage.Size
	}
	return nil
}

// dirtyLog is struct kvm_dirty_log. bitmap is a pointer, so that the garbage
// collector and a moving stack see it.
type dirtyLog struct {
	slot   uint32
	_      uint32
	bitmap unsafe.Pointer
}

// GetDirtyLog stores the slot's log in bitmap: bit i of word w is page 64*w+i of
// the slot. bitmap must have at least [mempage.Words] of the slot's pages; more
// words are not changed. Without manual protection the kernel clears the log and
// tracks the pages again.
//
// The slot must be registered with MemLogDirtyPages, otherwise the error is
// unix.ENOENT.
func (vm *VM) GetDirtyLog(slot uint32, bitmap []uint64) error {
	const op = "KVM_GET_DIRTY_LOG"
	vm.slotsMu.RLock()
	defer vm.slotsMu.RUnlock()
	pages, ok := vm.slots[slot]
	if !ok {
		return opError(unix.ENOENT, op, "slot %d", slot)
	}
	if need := mempage.Words(pages); uint64(len(bitmap)) < need {
		return opError(invalid("bitmap for %d pages: expected %d words or more, got %d", pages, need, len(bitmap)), op, "slot %d", slot)
	}
	log := &dirtyLog{slot: slot, bitmap: unsafe.Pointer(unsafe.SliceData(bitmap))}
	_, err := vm.h.ioctl(reqGetDirtyLog, unsafe.Pointer(log))
	runtime.KeepAlive(bitmap)
	if err != nil {
		return opError(err, op, "slot %d", slot)
	}
	return nil
}

// clearDirtyLog is struct kvm_clear_dirty_log.
type clearDirtyLog struct {
	slot   uint32
	pages  uint32
	first  uint64
	bitmap unsafe.Pointer
}

// ClearDirtyLog clears, in the log of a slot, the pages whose bits are set in
// bitmap, and tracks their writes again. Bit 0 of bitmap is page first of the
// slot, a multiple of 64. pages is a multiple of 64 too, unless the range ends at
// the slot's end.
//
// A bit whose page is not in the log at that moment has no effect. A bit whose
// page was written since the log was read deletes that write from the log: pass
// only what [VM.GetDirtyLog] reported, and only once.
//
// It is for manual protection (CapManualDirtyLogProtect2 enabled). Without manual
// protection the kernel executes it too, but then GetDirtyLog has never reported
// the bits that it clears.
func (vm *VM) ClearDirtyLog(slot uint32, first uint64, pages uint32, bitmap []uint64) error {
	const op = "KVM_CLEAR_DIRTY_LOG"
	vm.slotsMu.RLock()
	defer vm.slotsMu.RUnlock()
	if err := vm.checkClear(slot, first, uint64(pages), bitmap); err != nil {
		return opError(err, op, "slot %d pages [%#x,%#x)", slot, first, first+uint64(pages))
	}
	log := &clearDirtyLog{slot: slot, pages: pages, first: first, bitmap: unsafe.Pointer(unsafe.SliceData(bitmap))}
	_, err := vm.h.ioctl(reqClearDirtyLog, unsafe.Pointer(log))
	runtime.KeepAlive(bitmap)
	if err != nil {
		return opError(err, op, "slot %d pages [%#x,%#x)", slot, first, first+uint64(pages))
	}
	return nil
}

// checkClear applies the kernel's rules for a range (virt/kvm/kvm_main.c) and
// checks the bitmap's length. The caller holds slotsMu.
func (vm *VM) checkClear(slot uint32, first, pages uint64, bitmap []uint64) error {
	total, ok := vm.slots[slot]
	switch {
	case !ok:
		return unix.ENOENT
	case first%64 != 0:
		return invalid("the first page must be a multiple of 64")
	case first > total || pages > total-first:
		return invalid("the slot ends at page %#x", total)
	case pages%64 != 0 && pages != total-first:
		return invalid("expected a multiple of 64 pages, or a range to the slot's end, got %d pages", pages)
	case uint64(len(bitmap)) < mempage.Words(pages):
		return invalid("bitmap for %d pages: expected %d words or more, got %d", pages, mempage.Words(pages), len(bitmap))
	}
	return nil
}
