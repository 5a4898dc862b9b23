package memory

import (
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// adopted is memory of another process, here of the same one.
func adopted(t *testing.T, m *Memory) *Memory {
	t.Helper()
	f, err := m.File()
	if err != nil || f == nil {
		t.Fatalf("file %v, %v", f, err)
	}
	a, err := Adopt(m.Size(), m.backing, f)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestAdopt: two mappings of one memory have the same pages, also after the first one is
// gone, and know the same holes.
func TestAdopt(t *testing.T) {
	const size = 64 << 20
	for _, b := range []Backing{Memfd, Hugetlb} {
		t.Run(string(b), func(t *testing.T) {
			if b == Hugetlb {
				needHugePages(t, size/hugePageSize)
			}
			m, err := New(size, b)
			if err != nil {
				t.Fatal(err)
			}
			write := func(m *Memory, page uint64, text string) {
				t.Helper()
				if err := m.WriteAt([]byte(text), page<<mempage.Shift); err != nil {
					t.Fatal(err)
				}
			}
			read := func(m *Memory, page uint64, want string) {
				t.Helper()
				if got := m.SlotBytes(0, page, 1)[:len(want)]; string(got) != want {
					t.Errorf("page %d: expected %q, found %q", page, want, got)
				}
			}
			write(m, 7, "before")
			write(m, 5000, "far")
			a := adopted(t, m)
			write(m, 1025, "meanwhile")
			populated, err := m.Populations()
			if err == nil {
				err = a.Inherited(populated)
			}
			if err != nil {
				t.Fatal(err)
			}
			want := holesOf(t, m)
			if got := holesOf(t, a); !slices.Equal(got, want) {
				t.Errorf("populated words: expected %x, found %x", want, got)
			}
			for first := uint64(0); first < size>>mempage.Shift; first += 301 {
				n := uint64(size>>mempage.Shift) - first
				want, err1 := m.NextPopulated(0, first, n)
				got, err2 := a.NextPopulated(0, first, n)
				if want != got || err1 != nil || err2 != nil {
					t.Errorf("next populated page from %d: expected %d, found %d (%v, %v)", first, want, got, err1, err2)
				}
			}
			if most, err := a.AtMostPopulated(0, 1); err != nil || most {
				t.Errorf("at most one page is populated: %v, %v", most, err)
			}
			write(a, 9000, "there")
			read(m, 9000, "there")
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
			read(a, 7, "before")
			read(a, 1025, "meanwhile")
			read(a, 5000, "far")
			// What is handed over a second time is known, too.
			again := adopted(t, a)
			if populated, err = a.Populations(); err == nil {
				err = again.Inherited(populated)
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, want := holesOf(t, again), holesOf(t, a); !slices.Equal(got, want) {
				t.Errorf("populated words the second time: expected %x, found %x", want, got)
			}
			if err := again.Zero(0, 0, 16); err != nil {
				t.Fatal(err)
			}
			read(a, 7, "\x00\x00")
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
			read(a, 5000, "far")
			if err := a.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func holesOf(t *testing.T, m *Memory) []uint64 {
	t.Helper()
	pages := m.slots[0].pages()
	b := make([]uint64, mempage.Words(pages))
	if err := m.Populated(0, 0, pages, b); err != nil {
		t.Fatal(err)
	}
	// In parts that do not begin at huge pages, the same.
	for first := uint64(64 * 3); first < pages; first += 64 * 7 {
		n := min(64*7, pages-first)
		part := make([]uint64, mempage.Words(n))
		if err := m.Populated(0, first, n, part); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(part, b[first/64:first/64+mempage.Words(n)]) {
			t.Errorf("populated pages from %d differ from those of the whole", first)
		}
	}
	return b
}

// TestAdoptRefuses: what is no such memory.
func TestAdoptRefuses(t *testing.T) {
	const size = 8 << 20
	memfdOf := func(size int64, seals int) *os.File {
		fd, err := unix.MemfdCreate("x", unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Ftruncate(fd, size); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), "x")
	}
	file, err := os.Create(t.TempDir() + "/ram")
	if err == nil {
		err = file.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	const fixed = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
	for _, c := range []struct {
		file    *os.File
		backing Backing
		want    string
	}{
		{memfdOf(size, unix.F_SEAL_GROW), Memfd, "sealed"},
		{memfdOf(size/2, fixed), Memfd, "bytes"},
		{memfdOf(size, fixed), Anonymous, "two processes"},
		{memfdOf(size, fixed), Hugetlb, "file system"},
		{null, Memfd, "file system"},
		{file, Memfd, ""},
	} {
		m, err := Adopt(size, c.backing, c.file)
		if err == nil {
			t.Errorf("%s %s: accepted", c.file.Name(), c.backing)
			_ = m.Close()
		} else if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %s: expected an error with %q, found %v", c.file.Name(), c.backing, c.want, err)
		}
		if !bytes.Contains([]byte(c.file.Close().Error()), []byte("closed")) {
			t.Errorf("%s: left open", c.file.Name())
		}
	}
	m, err := New(size, Anonymous)
	if err != nil {
		t.Fatal(err)
	}
	if f, err := m.File(); f != nil || err != nil {
		t.Errorf("anonymous memory has the file %v, %v", f, err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}
