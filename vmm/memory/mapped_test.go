package memory

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/govmm/govmm/mempage"
	"pgregory.net/rapid"
)

// contentFile makes a file of so many pages, of which each third is a hole, and each with a
// number that is a multiple of seven zeros.
func contentFile(t testing.TB, pages int) (path string, content []byte) {
	t.Helper()
	content = make([]byte, pages*mempage.Size)
	path = filepath.Join(t.TempDir(), "memory")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(content))); err != nil {
		t.Fatal(err)
	}
	for i := range pages {
		if i%3 == 0 {
			continue
		}
		page := content[i*mempage.Size:][:mempage.Size]
		if i%7 != 0 {
			for j := range page {
				page[j] = byte(i*31 + j%251 + 1)
			}
		}
		if _, err := f.WriteAt(page, int64(i*mempage.Size)); err != nil {
			t.Fatal(err)
		}
	}
	return path, content
}

func mapFile(t testing.TB, path string, size int) *Memory {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := NewMapped(uint64(size), int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// Random writes, reads, punches, zeros and prefetches of memory from a file are compared
// with a model: the content is the same, no page with data is a hole, a page that is given
// back reads as zero and not as the file, and the file stays as it was.
func TestMappedModel(t *testing.T) {
	const pages = 640
	path, content := contentFile(t, pages)
	for name, scan := range map[string]bool{"with PAGEMAP_SCAN": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			rapid.Check(t, func(rt *rapid.T) {
				m := mapFile(t, path, len(content))
				defer func() { _ = m.Close() }()
				m.pagemap.scan = m.pagemap.scan && scan
				if rapid.Bool().Draw(rt, "few mappings") {
					m.mapped.pieces = maxPieces - 2
				}
				model := bytes.Clone(content)
				run := func(rt *rapid.T) (first, n uint64) {
					first = rapid.Uint64Range(0, pages-1).Draw(rt, "first")
					return first, rapid.Uint64Range(1, min(300, pages-first)).Draw(rt, "pages")
				}
				rt.Repeat(map[string]func(*rapid.T){
					"write": func(rt *rapid.T) {
						gpa := rapid.IntRange(0, len(model)-1).Draw(rt, "gpa")
						p := bytes.Repeat([]byte{rapid.Byte().Draw(rt, "byte")}, rapid.IntRange(1, min(9000, len(model)-gpa)).Draw(rt, "n"))
						if err := m.WriteAt(p, uint64(gpa)); err != nil {
							rt.Fatal(err)
						}
						copy(model[gpa:], p)
					},
					"zero": func(rt *rapid.T) {
						first, n := run(rt)
						if err := m.Zero(0, first, n); err != nil {
							rt.Fatal(err)
						}
						clear(model[first*mempage.Size : (first+n)*mempage.Size])
					},
					"punch": func(rt *rapid.T) {
						first, n := run(rt)
						if err := m.Punch(first*mempage.Size, n*mempage.Size); err != nil {
							rt.Fatal(err)
						}
						clear(model[first*mempage.Size : (first+n)*mempage.Size])
					},
					"prefetch": func(rt *rapid.T) {
						first, n := run(rt)
						m.Prefetch(1, func(int) (uint64, uint64) { return first, n })
					},
					"read": func(rt *rapid.T) {
						first, n := run(rt)
						got := make([]byte, n*mempage.Size)
						if err := m.ReadAt(got, first*mempage.Size); err != nil {
							rt.Fatal(err)
						}
						if !bytes.Equal(got, model[first*mempage.Size:][:len(got)]) {
							rt.Fatalf("pages [%d,+%d) differ", first, n)
						}
					},
					"": func(rt *rapid.T) {
						first, n := run(rt)
						if rapid.Bool().Draw(rt, "at rest") {
							m.mapped.prefetch.Wait()
						}
						bitmap := mempage.NewBitmap(n)
						if err := m.Populated(0, first, n, bitmap); err != nil {
							rt.Fatal(err)
						}
						for i := range n {
							page := model[(first+i)*mempage.Size:][:mempage.Size]
							if !bitmap.Get(i) && !isZero(page) {
								rt.Fatalf("page %d has data and is a hole", first+i)
							}
						}
						m.mapped.prefetch.Wait() // which makes pages populated
						if err := m.Populated(0, first, n, bitmap); err != nil {
							rt.Fatal(err)
						}
						next, err := m.NextPopulated(0, first, n)
						if want := first + bitmap.NextSet(0, n); err != nil || next != want {
							rt.Fatalf("next of [%d,+%d) is %d, expected %d: %v", first, n, next, want, err)
						}
					},
				})
			})
		})
	}
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, content) {
		t.Errorf("the file has changed: %v", err)
	}
}

func isZero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

// What is given back is given back: the host has no page for it any more.
func TestMappedPunchFrees(t *testing.T) {
	const pages = 1024
	path, content := contentFile(t, pages)
	m := mapFile(t, path, len(content))
	defer m.Close()
	if err := m.WriteAt(bytes.Repeat([]byte{9}, len(content)), 0); err != nil {
		t.Fatal(err)
	}
	if n, err := m.PopulatedPages(); err != nil || n != pages {
		t.Fatalf("%d pages populated, %v", n, err)
	}
	if err := m.Punch(0, uint64(len(content))); err != nil {
		t.Fatal(err)
	}
	if n, err := m.PopulatedPages(); err != nil || n != 0 {
		t.Errorf("%d pages are populated after all were given back, %v", n, err)
	}
	b := make([]byte, len(content))
	if err := m.ReadAt(b, 0); err != nil || !isZero(b) {
		t.Errorf("what was given back does not read as zero: %v", err)
	}
}

// A file that is cut off while it is mapped is an error of the access, not the end of the process.
func TestMappedTruncated(t *testing.T) {
	path, content := contentFile(t, 512)
	m := mapFile(t, path, len(content))
	defer m.Close()
	if err := os.Truncate(path, 100*mempage.Size); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 8)
	if err := m.ReadAt(b, 200*mempage.Size); err == nil {
		t.Error("a page that the file does not have any more was read")
	}
	if err := m.ReadAt(b, 50*mempage.Size); err != nil {
		t.Error(err)
	}
}

// Prefetch makes pages private copies, and ends with the memory.
func TestPrefetch(t *testing.T) {
	const pages = 4096
	path, content := contentFile(t, pages)
	m := mapFile(t, path, len(content))
	m.Prefetch(1, func(int) (uint64, uint64) { return 1024, 512 })
	m.mapped.prefetch.Wait()
	private := uint64(0)
	err := m.pagemap.populated(m.slots[0].HVA, pages, func(at, n uint64) bool {
		if at < 1024 || at+n > 1536 {
			t.Errorf("pages [%d,+%d) were read too", at, n)
		}
		private += n
		return true
	})
	if err != nil || private != 512 {
		t.Errorf("%d pages are private, %v; expected 512", private, err)
	}
	for range 100 {
		m.Prefetch(1, func(int) (uint64, uint64) { return 0, pages })
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

func TestNewMappedRefuses(t *testing.T) {
	path, content := contentFile(t, 512)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{len(content) + mempage.Size, len(content) - mempage.Size, 0, 7} {
		if m, err := NewMapped(uint64(size), int(f.Fd())); err == nil {
			t.Errorf("%d bytes of a file of %d", size, len(content))
			_ = m.Close()
		}
	}
	if m, err := NewMapped(uint64(len(content)), -1); err == nil {
		t.Error("no file")
		_ = m.Close()
	}
}
