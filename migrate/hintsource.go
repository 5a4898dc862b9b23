package migrate

import (
	"sort"

	"github.com/govmm/govmm/mempage"
)

// Hinting is a [Source] whose guest can be asked for its free pages.
type Hinting interface {
	HintSource() HintSource // nil: there is nobody to ask
}

// HintSource asks the guest which pages are free, by the command ids of virtio
// 1.2 section 5.5.6.5. Methods do not wait for the guest and work while it is
// stopped.
type HintSource interface {
	// SetHintSink says who receives the guest's answers; nil: nobody. A call to
	// the sink before may still be under way.
	SetHintSink(mempage.HintSink)
	// NewHintID returns an id that this guest has never been given, on any host.
	// An error is the reason why the guest cannot be asked.
	NewHintID() (uint32, error)
	// AnnounceHints asks for hints under an id from NewHintID. What the guest
	// queued before the call does not count under it.
	AnnounceHints(id uint32)
	// StopHints asks the guest to end its answer. It keeps what it hinted.
	StopHints()
	// DoneHints lets the guest use the pages that it hinted. While the guest is
	// stopped it learns only the last of these three calls, here or where it
	// goes on.
	DoneHints()
}

// pageRange is a run of pages of one memory slot.
type pageRange struct {
	slot     int
	first, n uint64 // in pages, first counted from the slot's first page
}

// appendPages appends the whole pages of a range, cut at the borders of slots,
// which are in ascending order of address. What lies in no slot is skipped.
func appendPages(pages []pageRange, slots []Slot, r mempage.Range) []pageRange {
	end := r.GPA + r.Bytes
	if end < r.GPA {
		return pages
	}
	i := sort.Search(len(slots), func(i int) bool { return slots[i].GPA+slots[i].Pages*mempage.Size > r.GPA })
	for ; i < len(slots) && slots[i].GPA < end; i++ {
		lo := max(r.GPA, slots[i].GPA)
		hi := min(end, slots[i].GPA+slots[i].Pages*mempage.Size)
		first := (lo - slots[i].GPA + mempage.Size - 1) / mempage.Size
		last := (hi - slots[i].GPA) / mempage.Size
		if last > first {
			pages = append(pages, pageRange{slot: i, first: first, n: last - first})
		}
	}
	return pages
}
