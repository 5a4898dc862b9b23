package memory

import (
	"encoding/binary"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// Bits are set in the right slots, also for a range across the end of a slot.
func TestMarkAcrossSlots(t *testing.T) {
	const gib = 1 << 30
	m := newMemory(t, 4*gib+mempage.Size, Anonymous)
	last := uint64(minSlotSize>>mempage.Shift - 1)
	for _, tt := range []struct {
		gpa, n uint64
		want   map[int][]uint64
	}{
		{0, 1, map[int][]uint64{0: {0}}},
		{0xfff, 2, map[int][]uint64{0: {0, 1}}},
		{63 << 12, 66 << 12, map[int][]uint64{0: seq(63, 66)}},
		{gib - 1, 1, map[int][]uint64{0: {last}}},
		{gib - 1, 2, map[int][]uint64{0: {last}, 1: {0}}},
		{2*gib - 0x2000, 0x3001, map[int][]uint64{1: {last - 1, last}, 2: {0, 1}}},
		{3*gib - 1, 1, map[int][]uint64{2: {last}}},
		{4 * gib, 1, map[int][]uint64{3: {0}}},
		{5*gib - 1, 2, map[int][]uint64{3: {last}, 4: {0}}},
		{5*gib + 5, 0, nil},
	} {
		if err := m.MarkDirty(tt.gpa, tt.n); err != nil {
			t.Fatal(err)
		}
		for i := range m.slots {
			if got := dirtyPages(t, m, i); !slices.Equal(got, tt.want[i]) {
				t.Errorf("[%#x,+%#x): slot %d has %v, want %v", tt.gpa, tt.n, i, got, tt.want[i])
			}
		}
	}
}

func seq(first, n uint64) []uint64 {
	s := make([]uint64, n)
	for i := range s {
		s[i] = first + uint64(i)
	}
	return s
}

func TestFetchDirtyTakes(t *testing.T) {
	m := newMemory(t, MinSize, Memfd)
	if err := m.write16(0x5000, 1); err != nil {
		t.Fatal(err)
	}
	if pages := dirtyPages(t, m, 0); !slices.Equal(pages, []uint64{5}) {
		t.Errorf("fetched %v", pages)
	}
	if pages := dirtyPages(t, m, 0); len(pages) != 0 {
		t.Errorf("fetched twice: %v", pages)
	}
	// Reads and Zero set no bits.
	if err := m.ReadAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := m.Zero(0, 0, 256); err != nil {
		t.Fatal(err)
	}
	if pages := dirtyPages(t, m, 0); len(pages) != 0 {
		t.Errorf("marked without a write: %v", pages)
	}
}

// Migration relies on this: code that fetches the bits, and then reads the pages, gets
// every write that has returned before the fetch.
func TestNoWriteIsLost(t *testing.T) {
	const pages, writers, writes = 64, 3, 10000 // all bits are in one word
	m := newMemory(t, MinSize, Anonymous)
	var (
		running        atomic.Int32
		started, ended atomic.Uint64 // fetches
		seen           [pages]atomic.Uint64
		wg             sync.WaitGroup
	)
	lastWord := func(page uint64) []byte { return m.SlotBytes(0, page, 1)[mempage.Size-8:] }
	running.Store(writers)
	for w := range uint64(writers) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer running.Add(-1)
			content := make([]byte, mempage.Size)
			for v := uint64(1); v <= writes; v++ {
				page := v%(pages/writers)*writers + w // a page of this writer only
				var err error
				if binary.LittleEndian.PutUint64(content[mempage.Size-8:], v); v%2 == 0 {
					err = m.WriteAt(content, page*mempage.Size)
				} else {
					err = m.write64(page*mempage.Size+mempage.Size-8, v)
				}
				if err != nil {
					t.Error(err)
					return
				}
				for next := started.Load() + 1; ended.Load() < next; {
					runtime.Gosched()
				}
				if got := seen[page].Load(); got != v {
					t.Errorf("page %d was last seen with version %d, and has %d", page, got, v)
					return
				}
			}
		}()
	}
	for running.Load() > 0 {
		started.Add(1)
		for _, page := range dirtyPages(t, m, 0) {
			seen[page].Store(binary.LittleEndian.Uint64(lastWord(page)))
		}
		ended.Add(1)
	}
	wg.Wait()
}
