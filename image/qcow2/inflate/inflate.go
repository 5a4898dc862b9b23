// Package inflate decompresses DEFLATE (RFC 1951) from one slice to another.
//
// A compressed cluster of a qcow2 image is small, lies in memory as a whole, and becomes
// exactly as many bytes as a cluster has. Without a window, buffers and a reader between
// them that takes half the time of a decompressor of streams.
//
//	var d inflate.Decoder
//	err := d.Fill(cluster, stored)
package inflate

import (
	"encoding/binary"
	"errors"
)

// ErrCorrupt is returned for bytes that are not DEFLATE.
var ErrCorrupt = errors.New("no valid deflate data")

// ErrShort is returned when the compressed bytes end, or say that they do, before the output is full.
var ErrShort = errors.New("the deflate data ends too early")

// Decoder holds the tables of a block. The zero value is ready; one goroutine uses it at a time.
type Decoder struct {
	lit     [litSize]uint32
	dist    [distSize]uint32
	pre     [1 << preBits]uint32
	lengths [maxLit + maxDist]uint8
	fixed   bool // the tables are those of blocks with fixed codes

	reader
	dst []byte
	out int // bytes of dst that are filled
}

// reader takes bits from bytes, from the lowest of each on.
type reader struct {
	src  []byte
	in   int    // bytes of src that are in buf, or have been
	buf  uint64 // the next bits
	have uint   // how many are in buf
	over uint   // how many of them src does not have, since it has ended
}

// refill makes at least 56 bits available, zeros where there are no more.
func (r *reader) refill() {
	if len(r.src)-r.in >= 8 {
		r.buf |= binary.LittleEndian.Uint64(r.src[r.in:]) << (r.have & 63)
		r.in += int(63-r.have) >> 3
		r.have |= 56
		return
	}
	for r.have < 56 {
		if r.in < len(r.src) {
			r.buf |= uint64(r.src[r.in]) << r.have
			r.in++
		} else {
			r.over += 8
		}
		r.have += 8
	}
}

// take returns the next n bits, of those that are available.
func (r *reader) take(n uint) uint32 {
	v := uint32(r.buf & (1<<n - 1))
	r.buf >>= n
	r.have -= n
	return v
}

// ended reports whether bits were taken that src does not have.
func (r *reader) ended() bool { return r.over > r.have }

// Fill decompresses src until dst is full. What follows in src is not looked at.
func (d *Decoder) Fill(dst, src []byte) error {
	d.reader, d.dst, d.out = reader{src: src}, dst, 0
	defer func() { d.src, d.dst = nil, nil }()
	for last := false; !last && d.out < len(d.dst); {
		d.refill()
		last = d.take(1) == 1
		var err error
		switch d.take(2) {
		case 0:
			err = d.stored()
		case 1:
			d.fixedTables()
			err = d.block()
		case 2:
			if err = d.tables(); err == nil {
				err = d.block()
			}
		default:
			err = ErrCorrupt
		}
		if d.ended() {
			return ErrShort
		}
		if err != nil {
			return err
		}
	}
	if d.out < len(d.dst) {
		return ErrShort
	}
	return nil
}

// stored copies a block that is not compressed.
func (d *Decoder) stored() error {
	d.take(d.have & 7)
	d.refill()
	n, inverse := d.take(16), d.take(16)
	if n != inverse^0xffff {
		return ErrCorrupt
	}
	if d.ended() {
		return ErrShort
	}
	d.in -= int((d.have - d.over) / 8) // give whole bytes back
	d.buf, d.have, d.over = 0, 0, 0
	n = uint32(min(int(n), len(d.dst)-d.out))
	if int(n) > len(d.src)-d.in {
		return ErrShort
	}
	copy(d.dst[d.out:], d.src[d.in:d.in+int(n)])
	d.in, d.out = d.in+int(n), d.out+int(n)
	return nil
}

// block decodes the symbols of a block: as many as possible with plenty of room on both
// sides, and the rest with care.
func (d *Decoder) block() error {
	if end, err := d.fast(); end || err != nil {
		return err
	}
	for d.out < len(d.dst) {
		d.refill()
		e := d.lit[d.buf&(1<<litBits-1)]
		if e&entrySub != 0 {
			e = d.lit[(uint64(e>>16)+d.buf>>litBits&(1<<(e>>8&15)-1))&(litSize-1)]
		}
		used := uint(e & 0xff)
		if e&entryLiteral != 0 {
			d.dst[d.out] = byte(e >> 16)
			d.out++
			d.take(used)
			if d.ended() {
				return ErrShort
			}
			continue
		}
		if e&entrySpecial != 0 {
			d.take(used)
			if e&entryEnd == 0 {
				return ErrCorrupt
			}
			return nil
		}
		n := value(e, d.buf)
		d.take(used)
		e = d.dist[d.buf&(1<<distBits-1)]
		if e&entrySub != 0 {
			e = d.dist[(uint64(e>>16)+d.buf>>distBits&(1<<(e>>8&15)-1))&(distSize-1)]
		}
		back := value(e, d.buf)
		d.take(uint(e & 0xff))
		if d.ended() {
			return ErrShort
		}
		if e&entrySpecial != 0 || back > d.out {
			return ErrCorrupt
		}
		for end := min(d.out+n, len(d.dst)); d.out < end; d.out++ {
			d.dst[d.out] = d.dst[d.out-back]
		}
	}
	return nil
}

const (
	// fastIn is how many bytes of input a turn of the fast loop may take: two refills.
	fastIn = 16
	// fastOut is how many bytes of output it may write: three literals or the longest
	// match, and what a copy by words writes behind that.
	fastOut = 3 + 258 + 8
)

// fast decodes symbols while there is room for a whole turn in src and dst; end says that
// the block is over.
func (d *Decoder) fast() (end bool, err error) {
	src, dst := d.src, d.dst
	in, out, buf, have := d.in, d.out, d.buf, d.have
	defer func() { d.in, d.out, d.buf, d.have = in, out, buf, have }()
	for len(src)-in >= fastIn && len(dst)-out >= fastOut {
		buf |= binary.LittleEndian.Uint64(src[in:]) << (have & 63)
		in += int(63-have) >> 3
		have |= 56

		// Three literals take at most 45 bits.
		e := d.lit[buf&(1<<litBits-1)]
		if e&entryLiteral != 0 {
			buf >>= e & 63
			have -= uint(e & 0xff)
			dst[out] = byte(e >> 16)
			out++
			e = d.lit[buf&(1<<litBits-1)]
			if e&entryLiteral != 0 {
				buf >>= e & 63
				have -= uint(e & 0xff)
				dst[out] = byte(e >> 16)
				out++
				e = d.lit[buf&(1<<litBits-1)]
				if e&entryLiteral != 0 {
					buf >>= e & 63
					have -= uint(e & 0xff)
					dst[out] = byte(e >> 16)
					out++
					continue
				}
			}
			// A length and a distance take at most 48.
			buf |= binary.LittleEndian.Uint64(src[in:]) << (have & 63)
			in += int(63-have) >> 3
			have |= 56
		}
		if e&entrySpecial != 0 {
			if e&entrySub != 0 {
				e = d.lit[(uint64(e>>16)+buf>>litBits&(1<<(e>>8&15)-1))&(litSize-1)]
				if e&entryLiteral != 0 {
					buf >>= e & 63
					have -= uint(e & 0xff)
					dst[out] = byte(e >> 16)
					out++
					continue
				}
			}
			if e&entrySpecial != 0 {
				buf >>= e & 63
				have -= uint(e & 0xff)
				if e&entryEnd == 0 {
					return true, ErrCorrupt
				}
				return true, nil
			}
		}
		n := value(e, buf)
		buf >>= e & 63
		have -= uint(e & 0xff)
		e = d.dist[buf&(1<<distBits-1)]
		if e&entrySub != 0 {
			e = d.dist[(uint64(e>>16)+buf>>distBits&(1<<(e>>8&15)-1))&(distSize-1)]
		}
		back := value(e, buf)
		buf >>= e & 63
		have -= uint(e & 0xff)
		if e&entrySpecial != 0 || back > out {
			return true, ErrCorrupt
		}
		repeat(dst, out, back, n)
		out += n
	}
	return false, nil
}

// repeat writes n bytes at out, which are those that begin back bytes before. It may write
// 7 bytes more.
func repeat(dst []byte, out, back, n int) {
	if back >= 8 && n <= 32 {
		to, from := dst[out:], dst[out-back:]
		for i := 0; i < n; i += 8 {
			binary.LittleEndian.PutUint64(to[i:], binary.LittleEndian.Uint64(from[i:]))
		}
		return
	}
	all := dst[out-back : out+n]
	if n <= 16 {
		for i := range n {
			all[back+i] = all[i]
		}
		return
	}
	for have := back; have < len(all); have *= 2 { // what is there, again and again
		copy(all[have:], all[:have])
	}
}
