package inflate

import "math/bits"

const (
	litBits  = 11 // of a code for literals and lengths that one look decides
	distBits = 8
	preBits  = 7 // the longest code of a code's length

	maxLit  = 288
	maxDist = 32
	maxBits = 15 // the longest code

	// litSize and distSize are what the tables may need: a longer code has its place in a
	// second table, which is no larger than twice the number of its codes' places. They are
	// powers of two so that an index needs no check.
	litSize  = 4096
	distSize = 1024
)

// An entry of a table: how many bits it takes, of which how many are the code (bits 8 to
// 11), and the value in the upper half, to which the rest of the bits are added.
const (
	entryLiteral = 1 << 31
	entrySpecial = 1 << 15 // neither a literal, nor a length, nor a distance
	entrySub     = 1 << 14 // go on in a second table: at its place, of so many bits as bits 8 to 11 say
	entryEnd     = 1 << 13 // of the block

	entryInvalid = entrySpecial // no code of the block
)

// value is what an entry and the bits behind its code say.
func value(e uint32, buf uint64) int {
	code := e >> 8 & 15
	return int(e>>16&0x7fff) + int(buf>>code&(1<<((e&0xff-code)&31)-1))
}

// litEntries and distEntries are the entries of all symbols, without their codes.
var litEntries, distEntries = func() (lit [maxLit]uint32, dist [maxDist]uint32) {
	for i := range 256 {
		lit[i] = entryLiteral | uint32(i)<<16
	}
	lit[256] = entrySpecial | entryEnd
	length := uint32(3)
	for i := range 28 { // RFC 1951, 3.2.5
		extra := uint32(max(0, i/4-1))
		lit[257+i] = length<<16 | extra
		length += 1 << extra
	}
	lit[285] = 258 << 16
	lit[286], lit[287] = entryInvalid, entryInvalid
	distance := uint32(1)
	for i := range 30 {
		extra := uint32(max(0, i/2-1))
		dist[i] = distance<<16 | extra
		distance += 1 << extra
	}
	dist[30], dist[31] = entryInvalid, entryInvalid
	return lit, dist
}()

// preEntries are those of the code of lengths.
var preEntries = func() (e [19]uint32) {
	for i := range e {
		e[i] = uint32(i) << 16
	}
	return e
}()

// order is how lengths of the code of lengths are stored.
var order = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// fixedTables makes those of a block with fixed codes.
func (d *Decoder) fixedTables() {
	if d.fixed {
		return
	}
	lengths := d.lengths[:]
	for i := range lengths {
		switch {
		case i < 144:
			lengths[i] = 8
		case i < 256:
			lengths[i] = 9
		case i < 280:
			lengths[i] = 7
		case i < maxLit:
			lengths[i] = 8
		default:
			lengths[i] = 5
		}
	}
	build(d.lit[:], litBits, lengths[:maxLit], litEntries[:])
	build(d.dist[:], distBits, lengths[maxLit:], distEntries[:])
	d.fixed = true
}

// tables reads the codes of a block and makes its tables.
func (d *Decoder) tables() error {
	d.fixed = false
	d.refill()
	lits, dists, pres := int(d.take(5))+257, int(d.take(5))+1, int(d.take(4))+4
	var pre [19]uint8
	for i := range pres {
		d.refill()
		pre[order[i]] = uint8(d.take(3))
	}
	if !build(d.pre[:], preBits, pre[:], preEntries[:]) {
		return ErrCorrupt
	}
	if lits > 286 || dists > 30 {
		return ErrCorrupt
	}
	lengths := d.lengths[:lits+dists]
	for i := 0; i < len(lengths); {
		d.refill()
		e := d.pre[d.buf&(1<<preBits-1)]
		if e&entrySpecial != 0 {
			return ErrCorrupt
		}
		d.take(uint(e & 0xff))
		if d.ended() {
			return ErrShort
		}
		symbol, n, v := e>>16, uint32(1), uint8(0)
		switch symbol {
		case 16:
			if i == 0 {
				return ErrCorrupt
			}
			v, n = lengths[i-1], 3+d.take(2)
		case 17:
			n = 3 + d.take(3)
		case 18:
			n = 11 + d.take(7)
		default:
			v = uint8(symbol)
		}
		if int(n) > len(lengths)-i {
			return ErrCorrupt
		}
		for range n {
			lengths[i] = v
			i++
		}
	}
	if !build(d.lit[:], litBits, lengths[:lits], litEntries[:]) || !build(d.dist[:], distBits, lengths[lits:], distEntries[:]) {
		return ErrCorrupt
	}
	return nil
}

// build makes the table of a code from its lengths, by symbol. It returns false if there
// are more codes than can be told apart. What is no code is entryInvalid.
func build(table []uint32, tableBits uint, lengths []uint8, entries []uint32) bool {
	var count [maxBits + 1]int
	for _, n := range lengths {
		count[n]++
	}
	codes := len(lengths) - count[0]
	count[0] = 0
	var next [maxBits + 2]uint32 // the next code of each length
	left := 1
	for n := 1; n <= maxBits; n++ {
		if left = left<<1 - count[n]; left < 0 {
			return false
		}
		next[n+1] = (next[n] + uint32(count[n])) << 1
	}
	first := table[:1<<tableBits]
	if left > 0 {
		if codes > 1 || codes > count[1] {
			return false // only one code of one bit, or none, may leave some out
		}
		for i := range first {
			first[i] = entryInvalid
		}
	}
	var longest [1 << litBits]uint8 // by the first bits of codes that are longer than those
	for n := maxBits; n > int(tableBits); n-- {
		for i := range uint32(count[n]) {
			prefix := reversed(next[n]+i, uint(n)) & (1<<tableBits - 1)
			longest[prefix] = max(longest[prefix], uint8(n))
		}
	}
	free := uint32(1) << tableBits // of the table, for second ones
	for symbol, length := range lengths {
		if length == 0 {
			continue
		}
		n := uint(length)
		code := reversed(next[n], n)
		next[n]++
		if n <= tableBits {
			e := entries[symbol] + uint32(n)<<8 + uint32(n)
			for i := code; i < uint32(len(first)); i += 1 << n {
				first[i] = e
			}
			continue
		}
		prefix := code & (1<<tableBits - 1)
		if most := longest[prefix]; most != 0 {
			width := uint32(most) - uint32(tableBits)
			longest[prefix] = 0
			first[prefix] = free<<16 | entrySpecial | entrySub | width<<8
			second := table[free : free+1<<width]
			for i := range second {
				second[i] = entryInvalid
			}
			free += 1 << width
		}
		e := first[prefix]
		at, width := e>>16, e>>8&15
		second := table[at : at+1<<width]
		e = entries[symbol] + uint32(n)<<8 + uint32(n)
		for i := code >> tableBits; i < uint32(len(second)); i += 1 << (n - tableBits) {
			second[i] = e
		}
	}
	return true
}

// reversed is a code of n bits with its first bit lowest.
func reversed(code uint32, n uint) uint32 { return bits.Reverse32(code) >> (32 - n) }
