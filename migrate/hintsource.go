package migrate

import (
	"sort"

	"github.com/govmm/govmm/mempage"
)

// Hinting is a [Source] whose guest can be asked for its free pages.
type Hinting interface {
	HintSource() HintSource // nil: there is nobody to ask
}

// HintSource asks the guest for its free pages, by the command ids of virtio 1.2
// section 5.5.6.5. No method waits for the guest, which may be stopped.
type HintSource interface {
	SetHintSink(mempage.HintSink) // gets the answers; nil: nobody does. An earlier sink's last call may still run
	NewHintID() (uint32, error)   // an id that this guest was never given, on any host; or why it cannot be asked
	AnnounceHints(id uint32)      // asks; what the guest queued before does not count under this id
	StopHints()                   // the guest is to end its answer, and keeps what it hinted
	DoneHints()                   // the guest may use its pages. While stopped it learns only the last of these three
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
