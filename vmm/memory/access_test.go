package memory

import (
	"bytes"
	"errors"
	"math/bits"
	"testing"

	"github.com/govmm/govmm/mempage"
)

func TestAccess(t *testing.T) {
	m := newMemory(t, MinSize, Anonymous)
	if err := m.WriteAt([]byte{1, 2, 3, 4, 5, 6, 7, 8, 9}, 0xffd); err != nil {
		t.Fatal(err)
	}
	v16, err16 := m.read16(0xffd)
	v32, err32 := m.read32(0xffe)
	v64, err64 := m.read64(0xffe)
	if v16 != 0x0201 || v32 != 0x05040302 || v64 != 0x0908070605040302 {
		t.Errorf("read %#x %#x %#x", v16, v32, v64)
	}
	if err := errors.Join(err16, err32, err64, m.write16(0x2000, 0x1122), m.write32(0x2002, 0x33445566), m.write64(0x2006, 0x778899aabbccddee)); err != nil {
		t.Fatal(err)
	}
	got, err := m.Slice(0x2000, 14)
	if want := []byte{0x22, 0x11, 0x66, 0x55, 0x44, 0x33, 0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99, 0x88, 0x77}; err != nil || !bytes.Equal(got, want) {
		t.Errorf("slice % x, %v", got, err)
	}
	if cap(got) != 14 {
		t.Errorf("a slice of 14 bytes can grow to %d", cap(got))
	}
	const end = MinSize
	for name, err := range map[string]error{
		"write32": m.write32(end-3, 0),
		"WriteAt": m.WriteAt(make([]byte, 2), end-1), "ReadAt": m.ReadAt(make([]byte, 2), end-1), "MarkDirty": m.MarkDirty(end-1, 2),
		"MarkDirty that wraps": m.MarkDirty(1, ^uint64(0)), "Punch": m.Punch(end-mempage.Size, 2*mempage.Size),
	} {
		if !errors.Is(err, errNotRAM) {
			t.Errorf("%s beyond the end: %v", name, err)
		}
	}
	if pages := dirtyPages(t, m, 0); len(pages) != 3 {
		t.Errorf("dirty pages %v, want 0, 1 and 2", pages)
	}
}

// Devices access guest memory often: an access must not allocate.
func TestAccessDoesNotAllocate(t *testing.T) {
	for _, b := range []Backing{Memfd, Anonymous} {
		m := newMemory(t, 16<<20, b)
		buf := make([]byte, 3*mempage.Size)
		bitmap := make([]uint64, mempage.Words(m.slots[0].pages()))
		var failed error
		check := func(err error) {
			if err != nil {
				failed = err
			}
		}
		for name, f := range map[string]func(){
			"WriteAt":    func() { check(m.WriteAt(buf, 0x1234)) },
			"ReadAt":     func() { check(m.ReadAt(buf, 0x1234)) },
			"Slice":      func() { _, err := m.Slice(0x10, 99); check(err) },
			"SlotBytes":  func() { m.SlotBytes(0, 1, 3) },
			"MarkDirty":  func() { check(m.MarkDirty(0x10, 1<<20)) },
			"FetchDirty": func() { check(m.FetchDirty(0, ignore)) },
			"Populated":  func() { check(m.Populated(0, 0, 4096, bitmap)) },
			"Punch":      func() { check(m.Punch(0x4000, 0x2000)) },
			"Zero":       func() { check(m.Zero(0, 7, 3)) },
		} {
			if n := testing.AllocsPerRun(100, f); n != 0 {
				t.Errorf("%s: %s allocates %v times", b, name, n)
			}
		}
		if failed != nil {
			t.Error(failed)
		}
	}
}

func TestSlotBytesOutside(t *testing.T) {
	m := newMemory(t, MinSize, Memfd)
	for _, r := range [][3]uint64{{0, 256, 1}, {0, 0, 257}, {0, ^uint64(0), 2}, {0, 1, ^uint64(0)}, {1, 0, 1}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("SlotBytes%v did not panic", r)
				}
			}()
			m.SlotBytes(int(r[0]), r[1], r[2])
		}()
		bitmap := make([]uint64, 8)
		if m.Populated(int(r[0]), r[1], r[2], bitmap) == nil || m.Zero(int(r[0]), r[1], r[2]) == nil {
			t.Errorf("Populated or Zero of %v succeeded", r)
		}
	}
	if m.Populated(0, 0, 256, make([]uint64, 3)) == nil || m.FetchDirty(1, ignore) == nil || m.FetchDirty(-1, ignore) == nil {
		t.Error("a bitmap that is too short, or a slot that is not there, was accepted")
	}
	if b := m.SlotBytes(0, 256, 0); len(b) != 0 {
		t.Errorf("%d bytes of no pages", len(b))
	}
}

// FuzzRange checks the bounds of every access against 128-bit arithmetic.
func FuzzRange(f *testing.F) {
	for _, gpa := range []uint64{0, 1<<30 - 1, 3<<30 - 8, 3 << 30, 4<<30 - 1, 4 << 30, 4<<30 + 1<<20, ^uint64(0)} {
		for _, n := range []uint64{0, 1, 8, 1 << 20, 1 << 32, ^uint64(0), ^uint64(0) - 4<<30} {
			f.Add(gpa, n)
		}
	}
	const size = 3<<30 + 2<<20
	m, err := New(size, Anonymous)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = m.Close() })
	f.Fuzz(func(t *testing.T, gpa, n uint64) {
		end, carry := bits.Add64(gpa, n, 0)
		inside := carry == 0 && (end <= HoleStart || gpa >= HoleEnd && end <= HoleEnd+2<<20)
		s, err := m.Slice(gpa, n)
		if (err == nil) != inside || err == nil && uint64(len(s)) != n {
			t.Fatalf("Slice(%#x, %#x): %d bytes, %v", gpa, n, len(s), err)
		}
		if err := m.MarkDirty(gpa, n); (err == nil) != inside {
			t.Fatalf("MarkDirty(%#x, %#x): %v", gpa, n, err)
		}
		if n <= 1<<16 {
			p := make([]byte, n)
			if err := m.ReadAt(p, gpa); (err == nil) != inside {
				t.Fatalf("ReadAt(%#x, %#x): %v", gpa, n, err)
			}
			if err := m.WriteAt(p, gpa); (err == nil) != inside {
				t.Fatalf("WriteAt(%#x, %#x): %v", gpa, n, err)
			}
		}
		marked, want := uint64(0), uint64(0)
		for i := range m.slots {
			if err := m.FetchDirty(i, func(_ int, word uint64) { marked += uint64(bits.OnesCount64(word)) }); err != nil {
				t.Fatal(err)
			}
		}
		if inside && n > 0 {
			want = (end-1)>>mempage.Shift - gpa>>mempage.Shift + 1
		}
		if marked != want {
			t.Fatalf("MarkDirty(%#x, %#x): %d pages marked, want %d", gpa, n, marked, want)
		}
	})
}

// BenchmarkWriteAt writes 4 bytes.
func BenchmarkWriteAt(b *testing.B) {
	m := newMemory(b, MinSize, Anonymous)
	word := make([]byte, 4)
	for i := range b.N {
		if err := m.WriteAt(word, uint64(i)*4%MinSize); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFetchDirty fetches the empty log of a slot: the cost of a round of a
// migration in which no device has written.
func BenchmarkFetchDirty(b *testing.B) {
	m := newMemory(b, minSlotSize, Anonymous)
	for range b.N {
		if err := m.FetchDirty(0, ignore); err != nil {
			b.Fatal(err)
		}
	}
}

func ignore(int, uint64) {}
