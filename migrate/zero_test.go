package migrate

import (
	"testing"

	"github.com/govmm/govmm/mempage"
)

func TestIsZeroSeesEveryByte(t *testing.T) {
	for _, size := range []int{0, 1, 63, 64, 65, mempage.Size} {
		p := make([]byte, size)
		if !isZero(p) {
			t.Fatalf("%d bytes of zero are not zero", size)
		}
		for i := range p {
			p[i] = 0x80
			if isZero(p) {
				t.Fatalf("byte %d of %d was not seen", i, size)
			}
			p[i] = 0
		}
	}
}

// The scan covers more memory than the caches hold, as in a migration.
func BenchmarkIsZero(b *testing.B) {
	memory := make([]byte, 256<<20)
	for i := range memory {
		memory[i] = 0 // populate: untouched memory is one shared page of zeros
	}
	for _, c := range []struct {
		name string
		size int
	}{{"memory", len(memory)}, {"cached", 64 << 10}} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(mempage.Size)
			at := 0
			for b.Loop() {
				if !isZero(memory[at : at+mempage.Size]) {
					b.Fatal("not zero")
				}
				at = (at + mempage.Size) % c.size
			}
		})
	}
	for at := 0; at < len(memory); at += mempage.Size {
		memory[at] = 1
	}
	b.Run("content", func(b *testing.B) {
		b.SetBytes(mempage.Size)
		at := 0
		for b.Loop() {
			if isZero(memory[at : at+mempage.Size]) {
				b.Fatal("zero")
			}
			at = (at + mempage.Size) % len(memory)
		}
	})
}
