package migrate

import (
	"testing"

	"pgregory.net/rapid"
)

func (b bitmap) get(i uint64) bool {
	return i < b.size() && b[i/wordBits]&(1<<(i%wordBits)) != 0
}

// any tells whether a bit in [first, first+n) is set.
func (b bitmap) any(first, n uint64) bool {
	lo, hi := b.clip(first, n)
	for w := lo / wordBits; w*wordBits < hi; w++ {
		if b[w]&wordMask(w, lo, hi) != 0 {
			return true
		}
	}
	return false
}

// andNot clears every bit that is set in src.
func (b bitmap) andNot(src bitmap) {
	for w := range min(len(b), len(src)) {
		b[w] &^= src[w]
	}
}

// A bitmap does what a slice of bools does, and nothing outside itself.
func TestBitmapAgainstBools(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := newBitmap(rapid.Uint64Range(0, 200).Draw(t, "bits"))
		want := make([]bool, b.size())
		index := rapid.OneOf(rapid.Uint64Range(0, 256), rapid.Uint64())
		inside := func(i, first, n uint64) bool { return i >= first && i-first < n }
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			first, n := index.Draw(t, "first"), index.Draw(t, "n")
			switch rapid.IntRange(0, 2).Draw(t, "do") {
			case 0:
				b.setRange(first, n)
				for i := range want {
					want[i] = want[i] || inside(uint64(i), first, n)
				}
			case 1:
				b.clearRange(first, n)
				for i := range want {
					want[i] = want[i] && !inside(uint64(i), first, n)
				}
			case 2:
				b.set(first)
				if first < uint64(len(want)) {
					want[first] = true
				}
			}
			checkBitmap(t, b, want, index.Draw(t, "from"), index.Draw(t, "end"))
		}
	})
}

func checkBitmap(t *rapid.T, b bitmap, want []bool, from, end uint64) {
	t.Helper()
	var count uint64
	nextSet, nextClear := end, max(min(end, b.size()), min(from, end))
	for i := b.size(); i > 0; i-- {
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
	if got := b.count(); got != count {
		t.Fatalf("count: %d, want %d", got, count)
	}
	if got := b.nextSet(from, end); got != nextSet {
		t.Fatalf("nextSet(%d, %d): %d, want %d", from, end, got, nextSet)
	}
	if got := b.nextClear(from, end); got != nextClear {
		t.Fatalf("nextClear(%d, %d): %d, want %d", from, end, got, nextClear)
	}
	var any bool
	for i := range want {
		if b.get(uint64(i)) != want[i] {
			t.Fatalf("bit %d: %v, want %v", i, b.get(uint64(i)), want[i])
		}
		any = any || want[i] && uint64(i) >= from && uint64(i)-from < end
	}
	if got := b.any(from, end); got != any {
		t.Fatalf("any(%d, %d): %v, want %v", from, end, got, any)
	}
	if b.get(b.size()) || b.get(^uint64(0)) {
		t.Fatal("a bit outside is set")
	}
}

func TestBitmapAndNot(t *testing.T) {
	a, b := newBitmap(130), newBitmap(70)
	a.setRange(0, 130)
	b.set(3)
	b.set(69)
	a.andNot(b)
	if a.get(3) || a.get(69) || a.count() != 128 || !a.get(129) {
		t.Fatalf("%x", a)
	}
}
