package vmm

import (
	"sort"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
)

// hintSource is a machine's balloon as package migrate asks it for free pages.
type hintSource struct {
	*balloon.Balloon
	slots []migrate.Slot // by address
}

var _ migrate.HintSource = (*hintSource)(nil)

// newHintSource returns nil for a machine without a balloon.
func newHintSource(b *balloon.Balloon, slots []migrate.Slot) migrate.HintSource {
	if b == nil {
		return nil
	}
	return &hintSource{b, slots}
}

// SetHintSink puts what turns addresses into slots and pages before the sink.
func (s *hintSource) SetHintSink(sink migrate.HintSink) {
	if sink == nil {
		s.Balloon.SetHintSink(nil)
		return
	}
	s.Balloon.SetHintSink(&hintSink{HintSink: sink, slots: s.slots})
}

// hintSink takes the balloon's words to the migration.
type hintSink struct {
	migrate.HintSink
	slots []migrate.Slot
	pages []migrate.PageRange
}

var _ mempage.HintSink = (*hintSink)(nil)

// HintPages cuts ranges at the borders of slots. The balloon has checked that
// they are RAM; what is not in a slot all the same is passed over.
func (s *hintSink) HintPages(id uint32, ranges []mempage.Range) {
	s.pages = s.pages[:0]
	for _, r := range ranges {
		s.pages = appendPages(s.pages, s.slots, r)
	}
	s.HintSink.HintPages(id, s.pages)
}

// appendPages appends the pages of a range, slot by slot.
func appendPages(pages []migrate.PageRange, slots []migrate.Slot, r mempage.Range) []migrate.PageRange {
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
			pages = append(pages, migrate.PageRange{Slot: i, First: first, N: last - first})
		}
	}
	return pages
}
