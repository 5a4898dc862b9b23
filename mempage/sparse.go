package mempage

// Sparse is a bitmap that knows which of its parts are empty: a search, or clearing
// all of it, costs what is set and not what exists. Bits are set only by the methods
// of Sparse; words may be read, and their bits cleared, in Bitmap.
type Sparse struct {
	Bitmap
	groups Bitmap // bit g is set if a word of [64*g, 64*g+64) may have bits
}

// groupBits is the number of bits that one bit of groups stands for.
const groupBits = WordBits * WordBits

// NewSparse returns a bitmap of n bits, all clear.
func NewSparse(n uint64) Sparse {
	b := NewBitmap(n)
	return Sparse{b, NewBitmap(Words(uint64(len(b))))}
}

// Set sets bit i.
func (s Sparse) Set(i uint64) {
	if i < s.Bits() {
		s.OrWord(i/WordBits, 1<<(i%WordBits))
	}
}

// OrWord sets the bits of word w that are set in bits. The word must exist.
func (s Sparse) OrWord(w, bits uint64) {
	s.Bitmap[w] |= bits
	s.groups.Set(w / WordBits)
}

// Or sets, from word w on, every bit that is set in src.
func (s Sparse) Or(w uint64, src Bitmap) {
	for i, word := range src {
		if word != 0 {
			s.OrWord(w+uint64(i), word)
		}
	}
}

// SetRange sets bits [first, first+n).
func (s Sparse) SetRange(first, n uint64) {
	s.Bitmap.SetRange(first, n)
	if lo, hi := s.clip(first, n); lo < hi {
		s.groups.SetRange(lo/groupBits, (hi-1)/groupBits-lo/groupBits+1)
	}
}

// Clear clears every bit.
func (s Sparse) Clear() { s.TakeWords(func(int, uint64) {}) }

// TakeWords calls f for every word that has bits, in order, and clears it before.
func (s Sparse) TakeWords(f func(w int, word uint64)) {
	end := s.groups.Bits()
	for g := s.groups.NextSet(0, end); g < end; g = s.groups.NextSet(g+1, end) {
		s.groups.ClearRange(g, 1)
		for w := g * WordBits; w < min((g+1)*WordBits, uint64(len(s.Bitmap))); w++ {
			if word := s.Bitmap[w]; word != 0 {
				s.Bitmap[w] = 0
				f(int(w), word)
			}
		}
	}
}

// NextSet returns the first set bit in [from, end), or end.
func (s Sparse) NextSet(from, end uint64) uint64 {
	limit := min(end, s.Bits())
	for from < limit {
		g := from / groupBits
		if next := s.groups.NextSet(g, s.groups.Bits()); next != g {
			from = next * groupBits
			continue
		}
		stop := min(limit, (g+1)*groupBits)
		if at := s.Bitmap.NextSet(from, stop); at < stop {
			return at
		}
		if from%groupBits == 0 && stop == (g+1)*groupBits {
			s.groups.ClearRange(g, 1) // it was looked at from end to end
		}
		from = stop
	}
	return end
}
