package loader

import (
	"bytes"
	"testing"

	"github.com/govmm/govmm/vmm/loader/elftest"
)

// In memory that is not zero, the loader clears the kernel's BSS and nothing else.
func TestLoadPVHIntoStaleMemory(t *testing.T) {
	m := newMemory(t, 4<<20)
	old := bytes.Repeat([]byte{0xa5}, 3<<20)
	if err := m.WriteAt(old, 1<<20); err != nil {
		t.Fatal(err)
	}
	code := []byte("\xf4 code of the kernel")
	const bss = 5<<16 + 77
	if _, err := loadPVH(m, elftest.Build(elftest.Kernel{Code: code, BSS: bss}), Options{Stale: true}); err != nil {
		t.Fatal(err)
	}
	want := append(append(bytes.Clone(code), make([]byte, bss)...), old[len(code)+bss:]...)
	if got := read(t, m, 1<<20, 3<<20); !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("byte %#x after the start of the kernel is %#x, want %#x", i, got[i], want[i])
			}
		}
	}
}
