package migrate

// PageRange is a run of pages of one memory slot.
type PageRange struct {
	Slot     int
	First, N uint64 // in pages, First counted from the slot's first page
}

// Hinting is implemented by a [Source] whose guest may be asked which of its
// pages are free.
type Hinting interface {
	// HintSource returns whom to ask; nil: the machine has nothing to ask.
	HintSource() HintSource
}

// HintSource asks the guest which pages are free, by the ids of virtio 1.2
// section 5.5.6.5. Its methods do not wait for the guest, and return although
// the guest is stopped.
type HintSource interface {
	// SetHintSink says who is told what the guest answers; nil: nobody. What
	// is being told when it is called may still be told to the sink before.
	SetHintSink(HintSink)
	// NewHintID returns an id that this guest was never given before, on any
	// host. An error is the reason why the guest cannot be asked.
	NewHintID() (uint32, error)
	// AnnounceHints asks for hints under an id from NewHintID. What the guest
	// had said before the call does not count under it.
	AnnounceHints(id uint32)
	// StopHints asks the guest to end its answer. It keeps what it hinted.
	StopHints()
	// DoneHints lets the guest use the pages that it has hinted. While the
	// guest is stopped it learns of the last of these three calls only, here
	// or where it goes on.
	DoneHints()
}

// HintSink is told what the guest says of its free pages. The calls come one at
// a time, in the order in which the guest said it, from a goroutine of the
// source's. A call may wait for the dirty log, never for the network, a vCPU or
// a device.
type HintSink interface {
	// HintStart: the guest begins to answer to id.
	HintStart(id uint32)
	// HintPages: pages that were free after id was announced. By the time of
	// the call the guest may have taken them back. The slice is the caller's.
	HintPages(id uint32, pages []PageRange)
	// HintLate: the guest hinted so many pages under an id that is not
	// current, and they were dropped.
	HintLate(pages uint64)
	// HintStop: the guest has ended its answer.
	HintStop()
	// HintLost: the guest's driver has gone, with what it had not said. It may
	// come while another call is under way.
	HintLost()
}
