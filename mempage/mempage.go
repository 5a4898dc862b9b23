// Package mempage defines guest pages: their size, bitmaps with one bit for each
// page, ranges of pages, and the interface by which a guest's hints about free
// pages arrive.
package mempage

const (
	// Size is the unit of tracking and transfer in bytes. KVM's dirty log has one
	// bit for each 4 KiB, independent of the host's page size for the memory;
	// virtio-balloon uses the same unit (virtio 1.2, 5.5.6).
	Size = 1 << Shift
	// Shift is the base-2 logarithm of Size.
	Shift = 12
)

// Range is a range of guest physical memory.
type Range struct {
	GPA   uint64 // the first byte's address; a multiple of Size
	Bytes uint64 // a multiple of Size
}

// HintSink receives a guest's hints about free pages, which the guest sends after a
// free page hint request (virtio 1.2, 5.5.6.5). Calls come one at a time, in the
// order of the guest's hints; only HintLost may come during another call.
//
// A hint is true at the time when the guest queues it. Before the call the guest
// may have allocated and written the page again: the sink decides whether the hint
// is still valid. Buffers return to the guest after the call. A call may wait for
// the dirty log, but not for the network, a vCPU or a device.
type HintSink interface {
	// HintStart: the driver begins to send hints for command id, which was current
	// when the driver's start command arrived.
	HintStart(id uint32)
	// HintPages: pages inside guest RAM that were free after id was announced.
	// The sink must not keep the slice. id may no longer be current: the sink
	// checks it under the lock that guards its changes.
	HintPages(id uint32, ranges []Range)
	// HintLate: this many pages came with an id that is not current; they were
	// dropped.
	HintLate(pages uint64)
	// HintStop: the driver has sent its stop command. Later hints belong to
	// another request.
	HintStop()
	// HintLost: the driver is gone and will not send the rest of its hints. It
	// may come during another call.
	HintLost()
}
