package machine

import (
	"errors"
	"fmt"
	"sync"

	"github.com/govmm/govmm/internal/testhook"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/vmm/memory"
)

// DirtyTracking is how the kernel tracks the guest's writes during a migration.
// It is chosen when a machine is made, for its host alone: it does not travel.
type DirtyTracking string

// The ways of tracking; docs/dirty-ring.md says which is better when.
const (
	// TrackAuto takes the bitmap where the kernel has manual protection
	// (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), otherwise the ring if there is one.
	TrackAuto   DirtyTracking = "auto"
	TrackBitmap DirtyTracking = "bitmap"
	TrackRing   DirtyTracking = "ring"
)

// ParseDirtyTracking checks a name; "" is auto.
func ParseDirtyTracking(s string) (DirtyTracking, error) {
	switch t := DirtyTracking(s); t {
	case "":
		return TrackAuto, nil
	case TrackAuto, TrackBitmap, TrackRing:
		return t, nil
	}
	return "", fmt.Errorf("dirty tracking %.40q: expected auto, bitmap or ring", s)
}

// Tracking returns how the machine tracks the guest's writes: [TrackBitmap] or
// [TrackRing].
func (m *Machine) Tracking() DirtyTracking {
	if m.kernel.rings != nil {
		return TrackRing
	}
	return TrackBitmap
}

// dirtyRingBytes is the size of a vCPU's ring where the kernel allows it: 65,536
// entries, so that a vCPU which writes flat out leaves the guest for a full ring only
// a few times in each pass over 256 MiB.
const dirtyRingBytes = 1 << 20

// chooseTracking enables the dirty ring if the spec asks for it. There are no vCPUs
// yet. manual are the flags of manual protection that the kernel has.
func (m *Machine) chooseTracking(manual int) (ring bool, err error) {
	want, err := ParseDirtyTracking(string(m.spec.Tracking))
	if err != nil || want == TrackBitmap || want == TrackAuto && manual != 0 {
		return false, err
	}
	most, err := m.kernel.vm.MaxDirtyRing()
	if err != nil {
		return false, err
	}
	if most == 0 {
		if want == TrackAuto {
			return false, nil
		}
		return false, fmt.Errorf("dirty tracking by ring: this host's KVM has none (KVM_CAP_DIRTY_LOG_RING): %w", errors.ErrUnsupported)
	}
	size := dirtyRingBytes
	if n := testhook.RingBytes.Load(); n != 0 {
		size = int(n)
	}
	return true, m.kernel.vm.EnableDirtyRing(min(size, most))
}

// ringVM and ringVCPU are what rings are collected from; kvm.VM and kvm.VCPU.
type ringVM interface {
	ResetDirtyRings() (int, error)
}

type ringVCPU interface {
	CollectDirty(func(slot uint32, page uint64)) int
}

// dirtyRings makes KVM's rings into a log that can be fetched slot by slot. It
// follows the rule of a kernel without manual protection: what a fetch reports is
// armed again when the fetch returns (R1). A page that was collected is in pending
// from before the reset that arms it until it is fetched, and every reset comes
// before the fetch that hands its pages over. The kernel does not log a write to a
// page whose entry has not been reset; but such a write is always followed by a
// report of that page, which leads to a later read.
type dirtyRings struct {
	vm    ringVM
	vcpus []ringVCPU

	// ringMu guards all below, and keeps collecting and resetting apart.
	// A vCPU's thread takes it when its ring is full, so nobody who holds it waits
	// for a vCPU.
	ringMu    sync.Mutex
	pages     []uint64         // of each slot
	pending   []mempage.Sparse // of each slot: collected, reset, and not taken yet
	collected []bool           // of each slot: by a collect, after which it was not taken
	entries   uint64           // collected so far
}

func newDirtyRings(vm ringVM, slots []memory.Slot) *dirtyRings {
	r := &dirtyRings{vm: vm, collected: make([]bool, len(slots))}
	for _, s := range slots {
		n := s.Size / mempage.Size
		r.pages = append(r.pages, n)
		r.pending = append(r.pending, mempage.NewSparse(n))
	}
	return r
}

// harvest collects what the rings have and arms those pages again. After an error
// the pages are pending, and some may not be armed.
func (r *dirtyRings) harvest() error {
	r.ringMu.Lock()
	defer r.ringMu.Unlock()
	return r.harvestLocked()
}

// harvestLocked needs ringMu.
func (r *dirtyRings) harvestLocked() error {
	n := 0
	for _, v := range r.vcpus {
		n += v.CollectDirty(r.note)
	}
	r.entries += uint64(n)
	if n == 0 {
		return nil
	}
	_, err := r.vm.ResetDirtyRings()
	return err
}

// note records one entry; ringMu is held. The kernel names only pages that the guest
// has; a page out of bounds is ignored.
func (r *dirtyRings) note(slot uint32, page uint64) {
	if uint64(slot) < uint64(len(r.pages)) && page < r.pages[slot] {
		r.pending[slot].Set(page)
	}
}

// collect harvests for one sync of all slots: the next take of each does not.
func (r *dirtyRings) collect() error {
	r.ringMu.Lock()
	defer r.ringMu.Unlock()
	err := r.harvestLocked()
	for i := range r.collected {
		r.collected[i] = err == nil
	}
	return err
}

// take hands over what is pending of one slot, after a harvest, unless collect has made
// it. After an error nothing has been handed over.
func (r *dirtyRings) take(slot int, each func(w int, word uint64)) error {
	r.ringMu.Lock()
	defer r.ringMu.Unlock()
	if slot < 0 || slot >= len(r.pending) {
		return fmt.Errorf("fetch the dirty rings: slot %d of %d", slot, len(r.pending))
	}
	if !r.collected[slot] {
		if err := r.harvestLocked(); err != nil {
			return err
		}
	}
	r.collected[slot] = false
	r.pending[slot].TakeWords(each)
	return nil
}

// drop forgets all that was logged. It is called when logging starts, since an
// earlier use may have left something, and when it stops.
func (r *dirtyRings) drop() error {
	r.ringMu.Lock()
	defer r.ringMu.Unlock()
	err := r.harvestLocked()
	for i, p := range r.pending {
		p.Clear()
		r.collected[i] = false
	}
	return err
}
