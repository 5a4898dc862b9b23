package migrate

import (
	"fmt"
	"math/bits"
	"slices"

	"github.com/govmm/govmm/mempage"
)

// apply puts a PAGES or PACKED frame into guest memory. Data pages are read or
// decompressed into it; zero pages are made to read as zero.
func (in *inlet) apply(target Target, f header) error {
	if err := f.span(in.session.slots); err != nil {
		return err
	}
	in.session.pass(false, int(f.slot), f.first+uint64(f.count))
	meta := in.meta.bytes(f.count)
	if err := in.conn.readFull(meta); err != nil {
		return err
	}
	pages, err := in.meta.decode(f)
	if err != nil {
		return err
	}
	if w, ok := target.(PageWriter); ok {
		return in.write(w, f, pages, int(f.length)-len(meta))
	}
	span := target.Bytes(int(f.slot), f.first, uint64(f.count))
	in.session.ahead.span(f, in.meta.data[:spanWords(f.count)], pages)
	return guard(target, int(f.slot), f.first, span, func() (err error) {
		if f.typ == framePacked {
			err = in.unpack(f, span, int(f.length)-len(meta), pages)
		} else if pages > 0 {
			in.iov = in.iov[:0]
			forRuns(in.meta.data[:spanWords(f.count)], func(start, end int) {
				in.iov = append(in.iov, span[start*mempage.Size:end*mempage.Size])
			})
			err = in.conn.readv(in.iov)
		}
		if err != nil {
			return err
		}
		return in.applyZero(target, f, span)
	})
}

// unpack reads n packed bytes, and puts their pages into the span if there are exactly
// as many as announced.
func (in *inlet) unpack(f header, span []byte, n, pages int) error {
	if !slices.Contains(in.session.features, codecFeature(f.flags)) {
		return fmt.Errorf("%w: PACKED by codec %d, which CONFIG does not name", ErrProtocol, f.flags)
	}
	packed := in.unpacker.room(n)
	if err := in.conn.readFull(packed); err != nil {
		return err
	}
	plain, err := in.unpacker.unpack(f.flags, packed, pages*mempage.Size)
	if err != nil {
		return err
	}
	forRuns(in.meta.data[:spanWords(f.count)], func(start, end int) {
		plain = plain[copy(span[start*mempage.Size:end*mempage.Size], plain):]
	})
	return nil
}

// applyZero is R6 at the destination: afterwards a ZERO page reads as zero, whatever
// it was before. Pages that read as zero already are left alone, so holes stay holes
// and huge pages stay whole.
func (in *inlet) applyZero(target Target, f header, span []byte) error {
	words := spanWords(f.count)
	zero := in.meta.zero[:words]
	any := uint64(0)
	for _, w := range zero {
		any |= w
	}
	if any == 0 {
		return nil
	}
	populated := in.meta.data[:words] // the data bits have been used
	if err := target.Populated(int(f.slot), f.first, uint64(f.count), populated); err != nil {
		return err
	}
	for w := range zero {
		zero[w] &= populated[w]
		for left := zero[w]; left != 0; left &= left - 1 {
			if isZero(span[(w*64+bits.TrailingZeros64(left))*mempage.Size:][:mempage.Size]) {
				zero[w] &^= left & -left
			}
		}
	}
	var err error
	forRuns(zero, func(start, end int) {
		if err == nil {
			err = target.Zero(int(f.slot), f.first+uint64(start), uint64(end-start))
		}
	})
	return err
}

// forRuns calls f for each run of set bits, [start, end).
func forRuns(words []uint64, f func(start, end int)) {
	start, end := 0, 0
	for w, word := range words {
		for left := word; left != 0; {
			lo := bits.TrailingZeros64(left)
			n := bits.TrailingZeros64(^(left >> lo))
			if at := w*64 + lo; at != end || start == end {
				if end > start {
					f(start, end)
				}
				start, end = at, at
			}
			end += n
			if lo+n >= 64 {
				break
			}
			left &^= (1<<n - 1) << lo
		}
	}
	if end > start {
		f(start, end)
	}
}
