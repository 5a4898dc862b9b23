package kvm

import (
	"sync/atomic"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// The dirty ring (Documentation/virt/kvm/api.rst, 8.29): instead of a bitmap for
// each slot, KVM has a ring for each vCPU, with the pages that the vCPU has
// written. KVM adds a page when it removes the page's write protection, and does
// not add it again until its entry is collected and the rings are reset.

const (
	// dirtyRingPage is KVM_DIRTY_LOG_PAGE_OFFSET of x86: the ring's offset in a
	// vCPU's mapping, in pages.
	dirtyRingPage = 64
	// dirtyGFNDirty: the kernel has written the entry. dirtyGFNReset: the entry
	// is collected, and its page may be tracked again.
	dirtyGFNDirty = 1 << 0
	dirtyGFNReset = 1 << 1
)

// dirtyGFN is struct kvm_dirty_gfn.
type dirtyGFN struct {
	flags  uint32 // kernel and user space change it, with acquire and release
	slot   uint32 // address space in the upper half
	offset uint64 // page within the slot
}

// dirtyRing is a vCPU's ring and how far it is collected.
type dirtyRing struct {
	area    []byte // mapped
	entries []dirtyGFN
	next    uint32 // the next entry to collect is next modulo the ring's size
}

// dirtyRingEntrySize is the size of an entry in bytes.
const dirtyRingEntrySize = int(unsafe.Sizeof(dirtyGFN{}))

// EnableDirtyRing makes KVM log writes in rings of this many bytes, a power of
// two, one for each vCPU. Call it before the first vCPU is created; afterwards it
// fails with unix.EINVAL. KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG then fail with
// unix.ENXIO. CapManualDirtyLogProtect2 must not be enabled: with
// DirtyLogInitiallySet, pages would not be write-protected when logging starts,
// and the rings would never get an entry for them.
func (vm *VM) EnableDirtyRing(bytes int) error {
	const op = "KVM_ENABLE_CAP"
	c, most, err := vm.dirtyRingCap()
	if err != nil {
		return err
	}
	if bytes <= 0 || bytes&(bytes-1) != 0 || bytes > most || bytes < mempage.Size {
		return opError(invalid("must be a power of two between %d and %d", mempage.Size, most), op, "dirty ring of %d bytes", bytes)
	}
	if err := vm.EnableCap(c, uint64(bytes)); err != nil {
		return err
	}
	vm.ringBytes = bytes
	return nil
}

// MaxDirtyRing returns the size of the largest dirty ring in bytes, 0 if this
// kernel has no dirty ring.
func (vm *VM) MaxDirtyRing() (int, error) {
	for _, c := range []Capability{gokvm.CapDirtyLogRingACQRel, gokvm.CapDirtyLogRing} {
		if n, err := vm.CheckExtension(c); err != nil || n > 0 {
			return n, err
		}
	}
	return 0, nil
}

// dirtyRingCap returns the capability to enable. The newer one says that entries
// are passed with acquire and release, which on x86 is true with both.
func (vm *VM) dirtyRingCap() (c Capability, most int, err error) {
	for _, c := range []Capability{gokvm.CapDirtyLogRingACQRel, gokvm.CapDirtyLogRing} {
		if most, err = vm.CheckExtension(c); err != nil || most > 0 {
			return c, most, err
		}
	}
	return 0, 0, opError(unsupported("this KVM has no dirty ring"), "KVM_ENABLE_CAP", "%v", gokvm.CapDirtyLogRing)
}

// mapRing maps the vCPU's ring, if the VM has rings.
func (v *VCPU) mapRing(bytes int) error {
	if bytes == 0 {
		return nil
	}
	area, err := unix.Mmap(int(v.h.raw()), dirtyRingPage*mempage.Size, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return opError(err, "mmap", "dirty ring of %s", v.what)
	}
	v.ring.area = area
	v.ring.entries = unsafe.Slice((*dirtyGFN)(unsafe.Pointer(unsafe.SliceData(area))), bytes/dirtyRingEntrySize)
	return nil
}

func (v *VCPU) unmapRing() error {
	if v.ring.area == nil {
		return nil
	}
	err := opError(unix.Munmap(v.ring.area), "munmap", "dirty ring of %s", v.what)
	v.ring = dirtyRing{}
	return err
}

// CollectDirty takes the entries that the vCPU's ring has, and calls f for each
// with the slot and the page within it; it returns how many there were. The
// pages are tracked again by the next [VM.ResetDirtyRings], and not before.
//
// Calls for one vCPU, and resets, exclude one another; the vCPU may run. On
// processors that buffer writes (Intel's PML), what it wrote since it entered
// the guest comes into the ring when it leaves: kick it first.
func (v *VCPU) CollectDirty(f func(slot uint32, page uint64)) int {
	r := &v.ring
	n := 0
	for range r.entries { // the ring is never fuller than this
		e := &r.entries[r.next%uint32(len(r.entries))]
		if atomic.LoadUint32(&e.flags)&(dirtyGFNDirty|dirtyGFNReset) != dirtyGFNDirty {
			break
		}
		f(e.slot, e.offset)
		atomic.StoreUint32(&e.flags, dirtyGFNReset)
		r.next++
		n++
	}
	return n
}

// ResetDirtyRings tracks again the pages of all entries that were collected, and
// frees their places. It returns how many there were. Until then a page that
// was collected can be written unnoticed; so what was collected is to be read
// after this has returned.
func (vm *VM) ResetDirtyRings() (int, error) {
	n, err := vm.h.ioctl(reqResetDirtyRings, nil)
	return n, opError(err, "KVM_RESET_DIRTY_RINGS", "VM")
}
