package mempage

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// A bitmap behaves like a slice of bools, and ignores bits outside.
func TestBitmapAgainstBools(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := NewBitmap(rapid.Uint64Range(0, 200).Draw(t, "bits"))
		want := make([]bool, b.Bits())
		index := rapid.OneOf(rapid.Uint64Range(0, 256), rapid.Uint64())
		inside := func(i, first, n uint64) bool { return i >= first && i-first < n }
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			first, n := index.Draw(t, "first"), index.Draw(t, "n")
			switch rapid.IntRange(0, 2).Draw(t, "do") {
			case 0:
				b.SetRange(first, n)
				for i := range want {
					want[i] = want[i] || inside(uint64(i), first, n)
				}
			case 1:
				b.ClearRange(first, n)
				for i := range want {
					want[i] = want[i] && !inside(uint64(i), first, n)
				}
			case 2:
				b.Set(first)
				if first < uint64(len(want)) {
					want[first] = true
				}
			}
			checkBitmap(t, b, want, index.Draw(t, "from"), index.Draw(t, "end"))
		}
	})
}

func checkBitmap(t *rapid.T, b Bitmap, want []bool, from, end uint64) {
	t.Helper()
	var count uint64
	nextSet, nextClear := end, max(min(end, b.Bits()), min(from, end))
	for i := b.Bits(); i > 0; i-- {
		at := i - 1
		if want[at] {
			count++
		}
		if at >= from && at < end {
			if want[at] {
				nextSet = at
			} else {
				nextClear = at
			}
		}
	}
	if got := b.Count(); got != count {
		t.Fatalf("count: %d, want %d", got, count)
	}
	if got := b.NextSet(from, end); got != nextSet {
		t.Fatalf("nextSet(%d, %d): %d, want %d", from, end, got, nextSet)
	}
	if got := b.NextClear(from, end); got != nextClear {
		t.Fatalf("nextClear(%d, %d): %d, want %d", from, end, got, nextClear)
	}
	var any bool
	for i := range want {
		if b.Get(uint64(i)) != want[i] {
			t.Fatalf("bit %d: %v, want %v", i, b.Get(uint64(i)), want[i])
		}
		any = any || want[i] && uint64(i) >= from && uint64(i)-from < end
	}
	if got := b.Any(from, end); got != any {
		t.Fatalf("any(%d, %d): %v, want %v", from, end, got, any)
	}
	if b.Get(b.Bits()) || b.Get(^uint64(0)) {
		t.Fatal("a bit outside is set")
	}
}

// A Sparse behaves like a Bitmap.
func TestSparseAgainstBitmap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Uint64Range(1, 5*groupBits).Draw(t, "bits")
		s, b := NewSparse(n), NewBitmap(n)
		at := rapid.OneOf(rapid.Uint64Range(0, n+100), rapid.Uint64())
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			first, many := at.Draw(t, "first"), at.Draw(t, "n")
			w := first % uint64(len(b))
			switch rapid.IntRange(0, 6).Draw(t, "do") {
			case 0:
				s.SetRange(first, many)
				b.SetRange(first, many)
			case 1:
				s.ClearRange(first, many)
				b.ClearRange(first, many)
			case 2:
				s.Set(first)
				b.Set(first)
			case 3:
				s.OrWord(w, many)
				b[w] |= many
			case 4:
				src := []uint64{0, many, first}[:min(3, uint64(len(b))-w)]
				s.Or(w, src)
				b[w:].Or(src)
			case 5:
				got := NewBitmap(n)
				s.TakeWords(func(w int, word uint64) { got[w] |= word })
				if !slices.Equal(got, b) {
					t.Fatalf("TakeWords: %x, want %x", got, b)
				}
				clear(b)
			case 6:
				s.Bitmap[w] &^= many
				b[w] &^= many
			}
			var words []uint64
			b.EachWord(func(w int, word uint64) {
				for len(words) < w {
					words = append(words, 0)
				}
				words = append(words, word)
			})
			if last := b.lastSet(); !slices.Equal(words, b[:last]) {
				t.Fatalf("EachWord: %x, want %x", words, b[:last])
			}
			from, end := at.Draw(t, "from"), at.Draw(t, "end")
			if got, want := s.NextSet(from, end), b.NextSet(from, end); got != want {
				t.Fatalf("NextSet(%d, %d): %d, want %d", from, end, got, want)
			}
			for from, end := uint64(0), s.Bits(); from < end; {
				if got, want := s.NextSet(from, end), b.NextSet(from, end); got != want {
					t.Fatalf("NextSet(%d, %d): %d, want %d", from, end, got, want)
				} else {
					from = max(got+1, b.NextClear(got, end))
				}
			}
		}
	})
}

// lastSet returns the number of words up to the last one that has bits.
func (b Bitmap) lastSet() (words int) {
	for i, word := range b {
		if word != 0 {
			words = i + 1
		}
	}
	return words
}

func TestBitmapAndNot(t *testing.T) {
	a, b := NewBitmap(130), NewBitmap(70)
	a.SetRange(0, 130)
	b.Set(3)
	b.Set(69)
	a.AndNot(b)
	if a.Get(3) || a.Get(69) || a.Count() != 128 || !a.Get(129) {
		t.Fatalf("%x", a)
	}
}

// The pages of a slot of 200 pages that are dirty, as ranges.
func ExampleBitmap_NextSet() {
	dirty := NewBitmap(200)
	dirty.Set(3)
	dirty.SetRange(60, 70)
	for first := dirty.NextSet(0, 200); first < 200; {
		end := dirty.NextClear(first, 200)
		fmt.Printf("[%d,%d)\n", first, end)
		first = dirty.NextSet(end, 200)
	}
	// Output:
	// [3,4)
	// [60,130)
}
