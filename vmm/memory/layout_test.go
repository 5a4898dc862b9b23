package memory

import (
	"errors"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// newMemory makes memory for one test.
func newMemory(t testing.TB, size uint64, b Backing) *Memory {
	t.Helper()
	m, err := New(size, b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func TestLayout(t *testing.T) {
	const mib, gib = 1 << 20, 1 << 30
	for _, tt := range []struct {
		size  uint64
		slots []Slot
	}{
		{mib, []Slot{{GPA: 0, Size: mib}}},
		{mib + mempage.Size, []Slot{{GPA: 0, Size: mib + mempage.Size}}},
		{gib, []Slot{{GPA: 0, Size: gib}}},
		{3 * gib, []Slot{{GPA: 0, Size: gib}, {GPA: gib, Size: gib}, {GPA: 2 * gib, Size: gib}}},
		{5*gib - 3*mib, []Slot{{GPA: 0, Size: gib}, {GPA: gib, Size: gib}, {GPA: 2 * gib, Size: gib},
			{GPA: 4 * gib, Size: gib}, {GPA: 5 * gib, Size: gib - 3*mib}}},
	} {
		for _, b := range []Backing{Memfd, Anonymous} {
			m := newMemory(t, tt.size, b)
			if m.Size() != tt.size {
				t.Errorf("size %d: Size %d", tt.size, m.Size())
			}
			slots := m.Slots()
			if len(slots) != len(tt.slots) {
				t.Fatalf("size %d: %d slots, want %d", tt.size, len(slots), len(tt.slots))
			}
			for i, s := range slots {
				if s.GPA != tt.slots[i].GPA || s.Size != tt.slots[i].Size {
					t.Errorf("size %d slot %d: %+v, want %+v", tt.size, i, s, tt.slots[i])
				}
				if s.HVA%hugePageSize != 0 {
					t.Errorf("size %d slot %d: host address %#x is not a multiple of 2 MiB", tt.size, i, s.HVA)
				}
			}
			if n, err := m.PopulatedPages(); err != nil || n != 0 {
				t.Errorf("size %d %s: %d pages populated after New, %v", tt.size, b, n, err)
			}
		}
	}
}

// However much memory there is, its slots are few, and every byte of RAM is in the slot
// of its address.
func TestSlotsOfLargeMemory(t *testing.T) {
	const gib = 1 << 30
	for _, tt := range []struct{ size, slot, low uint64 }{
		{64 * gib, gib, 3},
		{64*gib + 2<<20, 2 * gib, 2},
		{100 * gib, 2 * gib, 2},
		{200*gib + mempage.Size, 4 * gib, 1},
		{1024 * gib, 16 * gib, 1},
		{1025 * gib, 32 * gib, 1},
		{MaxSize, 256 * gib, 1},
	} {
		m := newMemory(t, tt.size, Anonymous)
		slots, off := m.Slots(), uint64(0)
		if len(slots) > maxSlots+2 || m.lows != tt.low {
			t.Errorf("%d GiB: %d slots, %d of them low", tt.size/gib, len(slots), m.lows)
		}
		for i, s := range slots {
			if s.Size > tt.slot || s.Size < tt.slot && i != int(m.lows)-1 && i != len(slots)-1 {
				t.Errorf("%d GiB: slot %d has %d MiB", tt.size/gib, i, s.Size>>20)
			}
			if i == int(m.lows) && s.GPA != HoleEnd || i > 0 && i != int(m.lows) && s.GPA != slots[i-1].GPA+slots[i-1].Size {
				t.Errorf("%d GiB: slot %d at %#x", tt.size/gib, i, s.GPA)
			}
			for _, at := range []uint64{0, s.Size - 1} {
				if index, in := m.at(off + at); index != i || in != at {
					t.Errorf("%d GiB: byte %#x is in slot %d at %#x, want %d, %#x", tt.size/gib, off+at, index, in, i, at)
				}
				if err := m.MarkDirty(s.GPA+at, 1); err != nil {
					t.Fatal(err)
				}
				if pages := dirtyPages(t, m, i); len(pages) != 1 || pages[0] != at/mempage.Size {
					t.Errorf("%d GiB: marked %#x of slot %d, pages %#x", tt.size/gib, at, i, pages)
				}
			}
			off += s.Size
		}
		if off != tt.size {
			t.Errorf("%d GiB: slots of %d bytes", tt.size/gib, off)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for _, tt := range []struct {
		size uint64
		b    Backing
	}{
		{0, Memfd}, {MinSize - mempage.Size, Memfd}, {MinSize + 1, Anonymous}, {MaxSize + mempage.Size, Memfd},
		{^uint64(0) - 4095, Memfd}, {MinSize, "disk"}, {3 << 20, Hugetlb},
	} {
		if m, err := New(tt.size, tt.b); err == nil {
			t.Errorf("New(%d, %s) succeeded: %v", tt.size, tt.b, m.Close())
		}
	}
}

// A word that is written at a guest address is in the slot at that address, below and
// above the hole.
func TestAddresses(t *testing.T) {
	const gib = 1 << 30
	m := newMemory(t, 5*gib, Memfd)
	for _, gpa := range []uint64{0, 0xffc, gib - 4, gib, 3*gib - 4, 4 * gib, 5 * gib, 6*gib - 4} {
		if err := m.write32(gpa, uint32(gpa>>8)^0xa5a5a5a5); err != nil {
			t.Fatal(err)
		}
	}
	for _, gpa := range []uint64{0, 0xffc, gib - 4, gib, 3*gib - 4, 4 * gib, 5 * gib, 6*gib - 4} {
		for i, s := range m.Slots() {
			if gpa < s.GPA || gpa >= s.GPA+s.Size {
				continue
			}
			page := (gpa - s.GPA) / mempage.Size
			b := m.SlotBytes(i, page, 1)[gpa%mempage.Size:]
			got := uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
			if got != uint32(gpa>>8)^0xa5a5a5a5 {
				t.Errorf("gpa %#x: %#x in slot %d page %#x", gpa, got, i, page)
			}
		}
	}
	// Slots below and above the hole are adjacent in host memory only.
	for _, gpa := range []uint64{3*gib - 3, 3 * gib, 4*gib - 1, 6*gib - 3, 6 * gib, ^uint64(0), ^uint64(2)} {
		if _, err := m.read32(gpa); !errors.Is(err, errNotRAM) {
			t.Errorf("read32(%#x): %v, want %v", gpa, err, errNotRAM)
		}
	}
	// A read may cross slots of contiguous RAM.
	var b [8]byte
	if err := m.ReadAt(b[:], gib-4); err != nil {
		t.Error(err)
	}
}

func TestCloseThenUse(t *testing.T) {
	m, err := New(MinSize, Anonymous)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.write16(0, 1); !errors.Is(err, errNotRAM) {
		t.Errorf("write after Close: %v", err)
	}
	if err := m.FetchDirty(0, func(int, uint64) {}); err == nil {
		t.Error("FetchDirty after Close succeeded")
	}
}
