package memory

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/govmm/govmm/internal/testenv"
)

// TestKeptFiles: a file that can be opened no more tells on, and what it says now; one that
// cannot be read any more is opened anew.
func TestKeptFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "memory.max")
	k := &keptFiles{files: map[string]*os.File{}}
	read := func(want string) {
		t.Helper()
		if text, err := k.ReadFile(strings.TrimPrefix(path, "/")); err != nil || string(text) != want {
			t.Errorf("read %q, %v; want %q", text, err, want)
		}
	}
	f, err := os.Create(path)
	testenv.Check(t, err)
	write := func(s string) {
		t.Helper()
		_, err := f.WriteAt([]byte(s), 0)
		testenv.Check(t, err)
	}
	write("100")
	read("100")
	testenv.Check(t, os.Remove(path))
	write("200")
	read("200")
	testenv.Check(t, f.Close())

	testenv.Check(t, os.WriteFile(path, []byte("300"), 0o600))
	testenv.Check(t, k.files[strings.TrimPrefix(path, "/")].Close()) // as a group that is gone
	read("300")
}

// TestNoDump: guest memory of every backing is left out of a core dump, and out of a child.
func TestNoDump(t *testing.T) {
	for _, b := range []Backing{Anonymous, Memfd, Hugetlb} {
		t.Run(string(b), func(t *testing.T) {
			if b == Hugetlb {
				needHugePages(t, 2)
			}
			m := newMemory(t, 4<<20, b)
			begin := fmt.Sprintf("%x-", uintptr(unsafe.Pointer(&m.ram[0])))
			text, err := os.ReadFile("/proc/self/smaps")
			testenv.Check(t, err)
			flags, found := "", false
			for line := range strings.Lines(string(text)) {
				if strings.HasPrefix(line, begin) {
					found = true
				}
				if words, ok := strings.CutPrefix(line, "VmFlags:"); ok && found {
					flags = words
					break
				}
			}
			for _, flag := range []string{" dd ", " dc "} {
				if !strings.Contains(flags, flag) {
					t.Errorf("VmFlags of guest memory: %q, without%s", flags, flag)
				}
			}
		})
	}
}
