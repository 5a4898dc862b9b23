package migrate

import "math/bits"

// bitmap has one bit for each page of a slot, or for each chunk of one: bit i
// is bit i%64 of word i/64, the layout of KVM's dirty log. Its methods take
// any index: what lies outside reads as clear and is not written.
type bitmap []uint64

const wordBits = 64

// bitmapWords is the number of words that hold n bits.
func bitmapWords(n uint64) uint64 {
	words := n / wordBits
	if n%wordBits != 0 {
		words++
	}
	return words
}

func newBitmap(n uint64) bitmap { return make(bitmap, bitmapWords(n)) }

// size is the number of bits that the bitmap has room for.
func (b bitmap) size() uint64 { return uint64(len(b)) * wordBits }

func (b bitmap) set(i uint64) {
	if i < b.size() {
		b[i/wordBits] |= 1 << (i % wordBits)
	}
}

// clip cuts the range [first, first+n) to the bitmap and returns its ends.
func (b bitmap) clip(first, n uint64) (lo, hi uint64) {
	size := b.size()
	if first >= size {
		return size, size
	}
	if n > size-first {
		n = size - first
	}
	return first, first + n
}

// wordMask has the bits of word w that lie in [lo, hi); w is a word that the
// range touches.
func wordMask(w, lo, hi uint64) uint64 {
	mask := ^uint64(0)
	if base := w * wordBits; lo > base {
		mask <<= lo - base
	}
	if end := (w + 1) * wordBits; hi < end {
		mask &= ^uint64(0) >> (end - hi)
	}
	return mask
}

// setRange sets bits [first, first+n).
func (b bitmap) setRange(first, n uint64) {
	lo, hi := b.clip(first, n)
	for w := lo / wordBits; w*wordBits < hi; w++ {
		b[w] |= wordMask(w, lo, hi)
	}
}

// clearRange clears bits [first, first+n).
func (b bitmap) clearRange(first, n uint64) {
	lo, hi := b.clip(first, n)
	for w := lo / wordBits; w*wordBits < hi; w++ {
		b[w] &^= wordMask(w, lo, hi)
	}
}

// count is the number of set bits.
func (b bitmap) count() uint64 {
	var n int
	for _, word := range b {
		n += bits.OnesCount64(word)
	}
	return uint64(n)
}

// nextSet is the first set bit in [from, end), or end.
func (b bitmap) nextSet(from, end uint64) uint64 {
	limit := min(end, b.size())
	for from < limit {
		w := from / wordBits
		if word := b[w] >> (from % wordBits); word != 0 {
			return min(from+uint64(bits.TrailingZeros64(word)), end)
		}
		from = (w + 1) * wordBits
	}
	return end
}

// nextClear is the first clear bit in [from, end), or end.
func (b bitmap) nextClear(from, end uint64) uint64 {
	limit := min(end, b.size())
	for from < limit {
		w := from / wordBits
		if word := ^b[w] >> (from % wordBits); word != 0 {
			return min(from+uint64(bits.TrailingZeros64(word)), end)
		}
		from = (w + 1) * wordBits
	}
	return min(from, end)
}

// or sets every bit that is set in src, which is no longer.
func (b bitmap) or(src bitmap) {
	for i, word := range src {
		b[i] |= word
	}
}
