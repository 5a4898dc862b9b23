package mempage

import "math/bits"

// Bitmap has one bit for each page of a slot, or for each chunk of pages. Bit i is
// bit i%64 of word i/64, as in KVM's dirty log. Its methods accept any index: bits
// outside of the bitmap are clear and cannot be set.
type Bitmap []uint64

// WordBits is the number of bits in a word.
const WordBits = 64

// Words returns the number of words of a bitmap of n bits.
func Words(n uint64) uint64 {
	words := n / WordBits
	if n%WordBits != 0 {
		words++
	}
	return words
}

// NewBitmap returns a bitmap of n bits, all clear.
func NewBitmap(n uint64) Bitmap { return make(Bitmap, Words(n)) }

// Bits returns the number of bits, a multiple of WordBits.
func (b Bitmap) Bits() uint64 { return uint64(len(b)) * WordBits }

// Set sets bit i.
func (b Bitmap) Set(i uint64) {
	if i < b.Bits() {
		b[i/WordBits] |= 1 << (i % WordBits)
	}
}

// Get returns whether bit i is set.
func (b Bitmap) Get(i uint64) bool {
	return i < b.Bits() && b[i/WordBits]>>(i%WordBits)&1 != 0
}

// Any returns whether a bit of [first, first+n) is set.
func (b Bitmap) Any(first, n uint64) bool {
	lo, hi := b.clip(first, n)
	return b.NextSet(lo, hi) < hi
}

// clip returns the part [lo, hi) of [first, first+n) that is inside the bitmap.
func (b Bitmap) clip(first, n uint64) (lo, hi uint64) {
	size := b.Bits()
	if first >= size {
		return size, size
	}
	if n > size-first {
		n = size - first
	}
	return first, first + n
}

// WordMask returns a mask of the bits of word w that are in [lo, hi). The word must
// have such bits.
func WordMask(w, lo, hi uint64) uint64 {
	mask := ^uint64(0)
	if base := w * WordBits; lo > base {
		mask <<= lo - base
	}
	if end := (w + 1) * WordBits; hi < end {
		mask &= ^uint64(0) >> (end - hi)
	}
	return mask
}

// SetRange sets bits [first, first+n).
func (b Bitmap) SetRange(first, n uint64) {
	lo, hi := b.clip(first, n)
	for w := lo / WordBits; w*WordBits < hi; w++ {
		b[w] |= WordMask(w, lo, hi)
	}
}

// ClearRange clears bits [first, first+n).
func (b Bitmap) ClearRange(first, n uint64) {
	lo, hi := b.clip(first, n)
	for w := lo / WordBits; w*WordBits < hi; w++ {
		b[w] &^= WordMask(w, lo, hi)
	}
}

// Count returns the number of set bits.
func (b Bitmap) Count() uint64 {
	var n int
	for _, word := range b {
		n += bits.OnesCount64(word)
	}
	return uint64(n)
}

// EachWord calls f for every word that has bits, in order. f may change the word. It is
// fast where most words are empty.
func (b Bitmap) EachWord(f func(w int, word uint64)) {
	for w := 0; w < len(b); {
		if w+8 <= len(b) {
			if eight := b[w : w+8 : w+8]; eight[0]|eight[1]|eight[2]|eight[3]|eight[4]|eight[5]|eight[6]|eight[7] == 0 {
				w += 8
				continue
			}
		}
		for end := min(w+8, len(b)); w < end; w++ {
			if b[w] != 0 {
				f(w, b[w])
			}
		}
	}
}

// NextSet returns the first set bit in [from, end), or end.
func (b Bitmap) NextSet(from, end uint64) uint64 {
	limit := min(end, b.Bits())
	for from < limit {
		w := from / WordBits
		if word := b[w] >> (from % WordBits); word != 0 {
			return min(from+uint64(bits.TrailingZeros64(word)), end)
		}
		from = (w + 1) * WordBits
	}
	return end
}

// NextClear returns the first clear bit in [from, end), or end.
func (b Bitmap) NextClear(from, end uint64) uint64 {
	limit := min(end, b.Bits())
	for from < limit {
		w := from / WordBits
		if word := ^b[w] >> (from % WordBits); word != 0 {
			return min(from+uint64(bits.TrailingZeros64(word)), end)
		}
		from = (w + 1) * WordBits
	}
	return min(from, end)
}

// Or sets every bit that is set in src. src must not be longer than b.
func (b Bitmap) Or(src Bitmap) {
	for i, word := range src {
		b[i] |= word
	}
}

// AndNot clears every bit that is set in src.
func (b Bitmap) AndNot(src Bitmap) {
	for w := range min(len(b), len(src)) {
		b[w] &^= src[w]
	}
}
