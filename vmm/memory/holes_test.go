package memory

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// Random writes, reads, punches and zeros are compared with a model: the content is the
// same, no page with data is reported as a hole, queries populate nothing, and the dirty
// bits are exactly those of the VMM's writes and punches.
func TestModel(t *testing.T) {
	const size, pages = 8 << 20, 8 << 20 / mempage.Size
	eachVariant(t, size, func(t *testing.T, v variant, fresh func(testing.TB) *Memory) {
		rapid.Check(t, func(rt *rapid.T) {
			m, err := New(size, v.backing)
			if err != nil {
				rt.Fatal(err)
			}
			defer func() { _ = m.Close() }()
			if v.entries {
				m.pagemap.scan = false
			}
			// khugepaged may populate pages at any time, unless huge pages are off; the
			// error is that of hugetlb, which it leaves alone.
			still := rapid.Bool().Draw(rt, "without huge pages")
			if still {
				if err := unix.Madvise(m.ram, unix.MADV_NOHUGEPAGE); err != nil && v.backing != Hugetlb {
					rt.Fatal(err)
				}
			}
			model := make([]byte, size)
			dirty := make(map[uint64]bool)
			mark := func(gpa, n uint64) {
				for page := gpa / mempage.Size; page*mempage.Size < gpa+n; page++ {
					dirty[page] = true
				}
			}
			page := rapid.Uint64Range(0, pages-1)
			run := func(rt *rapid.T) (first, n uint64) {
				first = page.Draw(rt, "first")
				return first, rapid.Uint64Range(1, min(600, pages-first)).Draw(rt, "pages")
			}
			populated := func(rt *rapid.T) uint64 {
				n, err := m.PopulatedPages()
				if err != nil {
					rt.Fatal(err)
				}
				return n
			}
			rt.Repeat(map[string]func(*rapid.T){
				"write": func(rt *rapid.T) {
					gpa := rapid.Uint64Range(0, size-1).Draw(rt, "gpa")
					p := bytes.Repeat([]byte{rapid.Byte().Draw(rt, "byte")}, rapid.IntRange(1, int(min(9000, size-gpa))).Draw(rt, "n"))
					if err := m.WriteAt(p, gpa); err != nil {
						rt.Fatal(err)
					}
					copy(model[gpa:], p)
					mark(gpa, uint64(len(p)))
				},
				"write page": func(rt *rapid.T) {
					gpa := page.Draw(rt, "page") * mempage.Size
					if err := m.write64(gpa+8, 0x1111); err != nil {
						rt.Fatal(err)
					}
					copy(model[gpa+8:], []byte{0x11, 0x11, 0, 0, 0, 0, 0, 0})
					mark(gpa, 1)
				},
				"read": func(rt *rapid.T) {
					first, n := run(rt)
					if !bytes.Equal(m.SlotBytes(0, first, n), model[first*mempage.Size:(first+n)*mempage.Size]) {
						rt.Fatal("content differs")
					}
				},
				"punch": func(rt *rapid.T) {
					first, n := run(rt)
					if err := m.Punch(first*mempage.Size, n*mempage.Size); err != nil {
						rt.Fatal(err)
					}
					clear(model[first*mempage.Size : (first+n)*mempage.Size])
					mark(first*mempage.Size, n*mempage.Size)
				},
				"zero": func(rt *rapid.T) {
					first, n := run(rt)
					if err := m.Zero(0, first, n); err != nil {
						rt.Fatal(err)
					}
					clear(model[first*mempage.Size : (first+n)*mempage.Size])
				},
				"ask": func(rt *rapid.T) {
					first, n := run(rt)
					before := populated(rt)
					bitmap := slices.Repeat([]uint64{^uint64(0)}, int(mempage.Words(n)))
					if err := m.Populated(0, first, n, bitmap); err != nil {
						rt.Fatal(err)
					}
					for i := range n {
						data := model[(first+i)*mempage.Size : (first+i+1)*mempage.Size]
						if !bitSet(bitmap, i) && bytes.Count(data, []byte{0}) != mempage.Size {
							rt.Fatalf("page %d has data and is reported as a hole", first+i)
						}
					}
					for i := n; i < uint64(len(bitmap))*64; i++ {
						if bitSet(bitmap, i) {
							rt.Fatalf("bit %d of %d pages is set", i, n)
						}
					}
					if after := populated(rt); still && after != before {
						rt.Fatalf("asking changed the populated pages from %d to %d", before, after)
					}
				},
			})
			for _, page := range dirtyPages(t, m, 0) {
				if !dirty[page] {
					rt.Fatalf("page %d is dirty without a write", page)
				}
				delete(dirty, page)
			}
			if len(dirty) > 0 {
				rt.Fatalf("%d written pages are not marked", len(dirty))
			}
			if !bytes.Equal(m.ram, model) {
				rt.Fatal("content differs in the end")
			}
			if err := m.Punch(0, size); err != nil {
				rt.Fatal(err)
			}
			if n := populated(rt); n != 0 && v.backing != Hugetlb {
				rt.Fatalf("%d pages populated after all was punched", n)
			}
		})
	})
}

// Holes in the usual cases.
func TestHoles(t *testing.T) {
	const size = 8 << 20
	eachVariant(t, size, func(t *testing.T, v variant, fresh func(testing.TB) *Memory) {
		m := fresh(t)
		count := func(when string, least, most uint64) {
			t.Helper()
			if n, err := m.PopulatedPages(); err != nil || n < least || n > most {
				t.Errorf("%s: %d pages populated, %v; want %d to %d", when, n, err, least, most)
			}
		}
		count("fresh", 0, 0)
		if err := m.write16(0x3000, 1); err != nil {
			t.Fatal(err)
		}
		bitmap := []uint64{0}
		if err := m.Populated(0, 3, 1, bitmap); err != nil || bitmap[0] != 1 {
			t.Errorf("the written page: %#x, %v", bitmap[0], err)
		}
		count("a page written", 1, 512) // one, or a huge page
		// Zero does not populate holes.
		if err := m.Zero(0, 1024, 1000); err != nil {
			t.Fatal(err)
		}
		count("holes zeroed", 1, 512)
		// A part of a huge page.
		if err := m.write16(0x4000, 2); err != nil {
			t.Fatal(err)
		}
		if err := m.Zero(0, 3, 1); err != nil {
			t.Fatal(err)
		}
		if a, _ := m.read16(0x3000); a != 0 {
			t.Error("the zeroed page is not zero")
		}
		if b, _ := m.read16(0x4000); b != 2 {
			t.Error("its neighbour was zeroed too")
		}
		if err := m.Punch(0, size); err != nil {
			t.Fatal(err)
		}
		if v.backing == Hugetlb {
			count("all punched", 512, 512) // the pool's pages are kept
		} else {
			count("all punched", 0, 0)
		}
		// Reading pages that were never written: anonymous memory maps the shared
		// zero page, which only PAGEMAP_SCAN distinguishes from others; some kernels
		// have no such page and populate. A memfd and hugetlb populate. All of these
		// are correct.
		if err := m.ReadAt(make([]byte, size), 0); err != nil {
			t.Fatal(err)
		}
		if v.backing == Anonymous && m.pagemap.scan {
			n := residentPages(t, m)
			count("all read", n, n)
		}
	})
}

// residentPages returns the number of pages that the kernel counts as resident or
// swapped out in /proc/self/smaps, without the shared zero page.
func residentPages(t *testing.T, m *Memory) uint64 {
	t.Helper()
	// A flag prevents that the kernel merges the mapping with others.
	if err := unix.Madvise(m.ram, unix.MADV_WIPEONFORK); err != nil {
		t.Fatal(err)
	}
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	start := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(m.ram))))
	end := start + uint64(len(m.ram))
	var n uint64
	inside := false
	for line := range strings.Lines(string(smaps)) {
		var a, b, kib uint64
		if _, err := fmt.Sscanf(line, "%x-%x ", &a, &b); err == nil {
			inside = a >= start && b <= end
			if !inside && a < end && b > start {
				t.Fatalf("mapping %#x-%#x goes beyond the memory's %#x-%#x", a, b, start, end)
			}
		} else if name, value, ok := strings.Cut(line, ":"); ok && inside && (name == "Rss" || name == "Swap") {
			if _, err := fmt.Sscan(value, &kib); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			n += kib << 10 / mempage.Size
		}
	}
	return n
}

// A migration asks for a few pages at a time, and the kernel looks at all data up to the next
// hole to find its end. So what is found is remembered, and stays exactly what the file has,
// whatever is written and punched out.
func TestDataIsRemembered(t *testing.T) {
	const pages = 64 << 20 / mempage.Size
	m := newMemory(t, pages*mempage.Size, Memfd)
	check(t, m.Prefault(0, 0, pages))
	var b [1]uint64
	for p := uint64(0); p < pages; p += 64 {
		check(t, m.Populated(0, p, 64, b[:]))
		if b[0] != ^uint64(0) {
			t.Fatalf("pages from %#x: %#x", p, b[0])
		}
	}
	if n := m.extents.walks; n != 1 {
		t.Errorf("the kernel has looked for the end of the data %d times, expected once", n)
	}
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	for range 2000 {
		first := r.Uint64N(pages)
		n := min(r.Uint64N(300)+1, pages-first)
		switch r.IntN(5) {
		case 0:
			check(t, m.Zero(0, first, n))
		case 1:
			check(t, m.Prefault(0, first, n))
		default:
			got, want := mempage.NewBitmap(n), mempage.NewBitmap(n)
			check(t, m.Populated(0, first, n, got))
			start := int64(first * mempage.Size)
			check(t, Extents(m.fd, start, start+int64(n*mempage.Size), func(from, to int64) error {
				want.SetRange(uint64(from-start)/mempage.Size, uint64(to-from)/mempage.Size)
				return nil
			}))
			if !slices.Equal(got, want) {
				t.Fatalf("%d pages from %#x: found %x, the file has %x", n, first, got, want)
			}
		}
	}
	t.Logf("the kernel has looked for an end %d times", m.extents.walks)
}

func TestPunchRefuses(t *testing.T) {
	m := newMemory(t, MinSize, Memfd)
	for _, r := range [][2]uint64{{1, mempage.Size}, {0, 100}, {mempage.Size, MinSize}, {HoleEnd, mempage.Size}} {
		if err := m.Punch(r[0], r[1]); err == nil {
			t.Errorf("Punch(%#x, %#x) succeeded", r[0], r[1])
		}
	}
	if err := m.Punch(0, 0); err != nil {
		t.Error(err)
	}
}

// A punch across the end of a slot affects both slots and sets their dirty bits.
func TestPunchAcrossSlots(t *testing.T) {
	for _, b := range []Backing{Memfd, Anonymous} {
		m := newMemory(t, 2<<30, b)
		if err := m.WriteAt(bytes.Repeat([]byte{7}, 4*mempage.Size), 1<<30-2*mempage.Size); err != nil {
			t.Fatal(err)
		}
		last := uint64(minSlotSize>>mempage.Shift - 1)
		dirtyPages(t, m, 0)
		dirtyPages(t, m, 1)
		if err := m.Punch(1<<30-mempage.Size, 2*mempage.Size); err != nil {
			t.Fatal(err)
		}
		if a, b := dirtyPages(t, m, 0), dirtyPages(t, m, 1); !slices.Equal(a, []uint64{last}) || !slices.Equal(b, []uint64{0}) {
			t.Errorf("marked %v and %v", a, b)
		}
		for gpa, want := range map[uint64]uint16{1<<30 - 2*mempage.Size: 0x0707, 1<<30 - mempage.Size: 0, 1 << 30: 0, 1<<30 + mempage.Size: 0x0707} {
			if got, err := m.read16(gpa); err != nil || got != want {
				t.Errorf("%s: gpa %#x is %#x, %v", b, gpa, got, err)
			}
		}
	}
}

// During writes, and while the kernel collapses and splits huge pages, a page that was
// written before the query is not reported as a hole.
func TestHolesUnderWrites(t *testing.T) {
	const size, pages = 16 << 20, 16 << 20 / mempage.Size
	eachVariant(t, size, func(t *testing.T, v variant, fresh func(testing.TB) *Memory) {
		m := fresh(t)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		written := pages / 2
		for page := range uint64(written) {
			if err := m.write16(page*mempage.Size, 1); err != nil {
				t.Fatal(err)
			}
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			rng := rand.New(rand.NewPCG(1, 2))
			for {
				select {
				case <-stop:
					return
				default:
				}
				page := uint64(written) + rng.Uint64N(pages/2)
				_ = m.write16(page*mempage.Size, 1)
				if rng.Uint64N(64) == 0 {
					_ = m.Zero(0, page, 1)
					_ = unix.Madvise(m.ram[:size/2], unix.MADV_COLLAPSE)
				}
			}
		}()
		bitmap := make([]uint64, mempage.Words(pages))
		for range 300 {
			if err := m.Populated(0, 0, pages, bitmap); err != nil {
				t.Fatal(err)
			}
			for page := range uint64(written) {
				if !bitSet(bitmap, page) {
					t.Fatalf("page %d has data and is reported as a hole", page)
				}
			}
		}
		close(stop)
		wg.Wait()
	})
}

// Without huge pages the error says how many are missing and what to do.
func TestHugetlbError(t *testing.T) {
	m, err := New(MaxSize, Hugetlb)
	if err == nil {
		t.Fatalf("16 TiB of huge pages: %v", m.Close())
	}
	for _, word := range []string{"MiB available in huge pages of 2 MiB (of ", "vm.nr_hugepages=", "use backing anonymous"} {
		if !strings.Contains(err.Error(), word) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error %q, want one line with %q", err, word)
		}
	}
}

// NextPopulated agrees with Populated.
func TestNextPopulated(t *testing.T) {
	const pages = 8 << 20 / mempage.Size
	eachVariant(t, 8<<20, func(t *testing.T, v variant, make func(testing.TB) *Memory) {
		m := make(t)
		few := func(most uint64, want bool) {
			t.Helper()
			if ok, err := m.AtMostPopulated(0, most); err != nil || ok != want && !v.entries || ok && v.entries {
				t.Fatalf("at most %d pages are populated: %v, %v", most, ok, err)
			}
		}
		few(0, true)
		check := func() {
			t.Helper()
			bitmap := mempage.NewBitmap(pages)
			if err := m.Populated(0, 0, pages, bitmap); err != nil {
				t.Fatal(err)
			}
			for _, first := range []uint64{0, 1, 511, 512, 700, 1024, 1535, pages - 1, pages} {
				for _, n := range []uint64{0, 1, 100, pages} {
					n = min(n, pages-first)
					got, err := m.NextPopulated(0, first, n)
					if want := bitmap.NextSet(first, first+n); err != nil || got != want {
						t.Errorf("from %d, %d pages: %d, %v, want %d", first, n, got, err, want)
					}
				}
			}
		}
		check()
		for _, page := range []uint64{1030, 700} {
			if err := m.WriteAt([]byte{1}, page*mempage.Size); err != nil {
				t.Fatal(err)
			}
			check()
		}
		n, err := m.PopulatedPages()
		if err != nil || n < 2 {
			t.Fatalf("%d pages are populated, %v", n, err)
		}
		few(n-1, false)
		few(n, true)
		if err := m.Punch(0, pages*mempage.Size); err != nil {
			t.Fatal(err)
		}
		check()
		if _, err := m.NextPopulated(0, pages, 1); err == nil {
			t.Error("pages beyond the slot were accepted")
		}
	})
}
