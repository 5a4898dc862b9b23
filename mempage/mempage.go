// Package mempage has what every part that deals with guest pages agrees on: the
// size of a page, bitmaps with one bit a page, ranges of pages, and how a guest
// tells that pages are free.
package mempage

const (
	// Size is the unit of tracking and transfer in bytes. KVM's dirty log has one
	// bit for each 4 KiB, whatever the host backs the memory with; virtio-balloon
	// counts in the same unit (virtio 1.2, 5.5.6).
	Size = 1 << Shift
	// Shift is the base-2 logarithm of Size.
	Shift = 12
)

// Range is guest physical memory: whole pages.
type Range struct {
	GPA   uint64 // of the first byte; a multiple of Size
	Bytes uint64 // a multiple of Size
}

// HintSink is told what a guest says of its free pages in answer to a free-page
// hint request (virtio 1.2, 5.5.6.5). Calls come one at a time, in the order in
// which the guest said it, but for HintLost.
//
// A hint is about a page as it was when the guest queued it. By the time of the
// call the guest may have taken the page back and written it: whether the hint
// still counts is for the sink to decide. Buffers go back to the guest after the
// call. A call may wait for the dirty log, never for the network, a vCPU or a
// device.
type HintSink interface {
	// HintStart: the driver begins to answer to id, which was current when the
	// driver's command arrived.
	HintStart(id uint32)
	// HintPages: pages that were free after id was announced, inside guest RAM.
	// The slice is the caller's. id may no longer be current: the sink checks it
	// again, where it also changes it.
	HintPages(id uint32, ranges []Range)
	// HintLate: so many pages came under an id that is not current, and were
	// dropped.
	HintLate(pages uint64)
	// HintStop: the driver has ended its answer; what it says next belongs to
	// another one.
	HintStop()
	// HintLost: the driver has gone, with all that it had not said. It may come
	// while another call runs.
	HintLost()
}
