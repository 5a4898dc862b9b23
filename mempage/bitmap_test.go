package mempage

import (
	"fmt"
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
