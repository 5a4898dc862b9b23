package memory

import (
	"bytes"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// Prefault populates holes with zeros and does not change other pages.
func TestPrefault(t *testing.T) {
	const size = 8 << 20
	eachVariant(t, size, func(t *testing.T, v variant, fresh func(testing.TB) *Memory) {
		m := fresh(t)
		if err := m.WriteAt([]byte{7}, 4<<20); err != nil {
			t.Fatal(err)
		}
		before, err := m.PopulatedPages()
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Prefault(0, 2<<20>>mempage.Shift, 4<<20>>mempage.Shift); err != nil {
			t.Fatal(err)
		}
		there := make([]uint64, size>>mempage.Shift/64)
		if err := m.Populated(0, 0, size>>mempage.Shift, there); err != nil {
			t.Fatal(err)
		}
		for page := uint64(2 << 20 >> mempage.Shift); page < 6<<20>>mempage.Shift; page++ {
			if !bitSet(there, page) {
				t.Fatalf("page %#x is not populated; %d pages were before", page, before)
			}
		}
		// Read only populated pages: reading a hole of a memfd populates it.
		got, want := make([]byte, 4<<20), make([]byte, 4<<20)
		want[2<<20] = 7
		if err := m.ReadAt(got, 2<<20); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the content is another one, error %v", err)
		}
		if pages := dirtyPages(t, m, 0); len(pages) != 1 {
			t.Errorf("pages %v are marked as written", pages)
		}
		if err := m.Zero(0, 2<<20>>mempage.Shift, 2<<20>>mempage.Shift); err != nil {
			t.Fatal(err)
		}
		if after, err := m.PopulatedPages(); err != nil || v.backing != Hugetlb && after > before+4<<20>>mempage.Shift {
			t.Errorf("%d pages are populated after Zero, error %v", after, err)
		}
	})
}

func TestPrefaultRefuses(t *testing.T) {
	m := newMemory(t, 4<<20, DefaultBacking)
	for _, c := range []struct {
		index    int
		first, n uint64
	}{{1, 0, 1}, {-1, 0, 1}, {0, 1024, 1}, {0, 1, 1024}, {0, 1, ^uint64(0)}} {
		if err := m.Prefault(c.index, c.first, c.n); err == nil {
			t.Errorf("slot %d, [%d,+%d): no error", c.index, c.first, c.n)
		}
	}
	if err := m.Prefault(0, 0, 0); err != nil {
		t.Error(err)
	}
}
