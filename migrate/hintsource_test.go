package migrate

import (
	"slices"
	"testing"

	"github.com/govmm/govmm/mempage"
	"pgregory.net/rapid"
)

// hintSlots are the slots of a guest of 4.5 GiB. The PCI hole is between the third and the
// fourth.
var hintSlots = []Slot{
	{GPA: 0, Pages: 1 << 18}, {GPA: 1 << 30, Pages: 1 << 18}, {GPA: 2 << 30, Pages: 1 << 18},
	{GPA: 4 << 30, Pages: 1 << 18}, {GPA: 5 << 30, Pages: 1 << 17},
}

func TestHintsAreCutAtSlots(t *testing.T) {
	const gib = 1 << 30
	for name, c := range map[string]struct {
		r    mempage.Range
		want []pageRange
	}{
		"one page":          {mempage.Range{GPA: 0x5000, Bytes: 0x1000}, []pageRange{{slot: 0, first: 5, n: 1}}},
		"a border":          {mempage.Range{GPA: gib - 0x1000, Bytes: 0x3000}, []pageRange{{slot: 0, first: 1<<18 - 1, n: 1}, {slot: 1, first: 0, n: 2}}},
		"three slots":       {mempage.Range{GPA: 0x1000, Bytes: 3*gib - 0x1000}, []pageRange{{slot: 0, first: 1, n: 1<<18 - 1}, {slot: 1, first: 0, n: 1 << 18}, {slot: 2, first: 0, n: 1 << 18}}},
		"across the hole":   {mempage.Range{GPA: 3*gib - 0x1000, Bytes: gib + 0x2000}, []pageRange{{slot: 2, first: 1<<18 - 1, n: 1}, {slot: 3, first: 0, n: 1}}},
		"in the hole":       {mempage.Range{GPA: 3 * gib, Bytes: gib}, nil},
		"beyond the end":    {mempage.Range{GPA: 5*gib + 1<<29 - 0x1000, Bytes: gib}, []pageRange{{slot: 4, first: 1<<17 - 1, n: 1}}},
		"behind everything": {mempage.Range{GPA: 1 << 40, Bytes: gib}, nil},
		"wraps around":      {mempage.Range{GPA: ^uint64(0) - 0xfff, Bytes: 0x2000}, nil},
		"no whole page":     {mempage.Range{GPA: 0x1001, Bytes: 0x1ffe}, nil},
		"nothing":           {mempage.Range{GPA: gib}, nil},
	} {
		if got := appendPages(nil, hintSlots, c.r); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// For any range, each of its whole pages that is RAM is returned once, and no other.
func TestHintsAreCutAtSlotsWhateverTheyAre(t *testing.T) {
	slots := []Slot{{GPA: 0, Pages: 5}, {GPA: 0x5000, Pages: 3}, {GPA: 0xa000, Pages: 4}}
	rapid.Check(t, func(t *rapid.T) {
		r := mempage.Range{GPA: rapid.Uint64Range(0, 0x12000).Draw(t, "gpa"), Bytes: rapid.Uint64Range(0, 0x12000).Draw(t, "bytes")}
		seen := map[uint64]bool{}
		for _, p := range appendPages(nil, slots, r) {
			for i := p.first; i < p.first+p.n; i++ {
				gpa := slots[p.slot].GPA + i*mempage.Size
				if i >= slots[p.slot].Pages || seen[gpa] || gpa < r.GPA || gpa+mempage.Size > r.GPA+r.Bytes {
					t.Fatalf("page %d of slot %d", i, p.slot)
				}
				seen[gpa] = true
			}
		}
		want := 0
		for _, s := range slots {
			for gpa := s.GPA; gpa < s.GPA+s.Pages*mempage.Size; gpa += mempage.Size {
				if gpa >= r.GPA && gpa+mempage.Size <= r.GPA+r.Bytes {
					want++
				}
			}
		}
		if len(seen) != want {
			t.Fatalf("%d pages, want %d", len(seen), want)
		}
	})
}
