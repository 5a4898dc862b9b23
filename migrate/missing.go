package migrate

import (
	"encoding/binary"
	"fmt"

	"github.com/govmm/govmm/mempage"
)

// MISSING frames name pages by bitmaps: from the source those that it will not have sent
// when the guest moves, from the destination those that it lacks. A list of them ends with
// one of no pages, whose flags say what it is.

// missingPages is the most pages that one MISSING names.
const missingPages = 1 << 18

const (
	flagEnd         uint8 = 1 << 0 // MISSING: the list is whole; first is the number of the stop
	flagPreliminary uint8 = 1 << 1 // MISSING, with flagEnd: nothing is missing yet; the destination may forget these
)

// sendMissing writes a list. bits has a bitmap for each slot.
func sendMissing(c *conn, bits [][]uint64, end header) error {
	payload := make([]byte, 0, missingPages/8)
	for slot, words := range bits {
		for from := 0; from < len(words); from += missingPages / 64 {
			part := words[from:min(from+missingPages/64, len(words))]
			lo, hi := 0, len(part)
			for lo < hi && part[lo] == 0 {
				lo++
			}
			for hi > lo && part[hi-1] == 0 {
				hi--
			}
			if lo == hi {
				continue
			}
			payload = payload[:0]
			for _, w := range part[lo:hi] {
				payload = binary.LittleEndian.AppendUint64(payload, w)
			}
			h := header{typ: frameMissing, slot: uint16(slot), first: uint64(from+lo) * 64, count: uint32(hi-lo) * 64}
			if err := c.writeFrame(h, payload); err != nil {
				return err
			}
		}
	}
	end.typ, end.flags = frameMissing, end.flags|flagEnd
	return c.writeFrame(end)
}

// missingList collects a list.
type missingList struct {
	slots []Slot
	bits  [][]uint64 // nil: nothing has come
}

// add takes a MISSING frame whose payload has not been read.
func (l *missingList) add(c *conn, f header) (whole bool, err error) {
	if l.bits == nil {
		l.bits = newBits(l.slots)
	}
	if f.flags&flagEnd != 0 {
		if f.length != 0 || f.count != 0 || f.flags&^(flagEnd|flagPreliminary) != 0 {
			return false, fmt.Errorf("%w: MISSING with flags %#x, of %d pages and %d bytes", ErrProtocol, f.flags, f.count, f.length)
		}
		return true, nil
	}
	switch {
	case int(f.slot) >= len(l.slots):
		return false, fmt.Errorf("%w: MISSING for memory slot %d of %d", ErrProtocol, f.slot, len(l.slots))
	case f.flags != 0 || f.count == 0 || f.count > missingPages || f.count%64 != 0 || f.first%64 != 0 || f.length != f.count/8:
		return false, fmt.Errorf("%w: MISSING of %d pages from page %#x, in %d bytes", ErrProtocol, f.count, f.first, f.length)
	}
	words := l.bits[f.slot]
	if f.first/64 >= uint64(len(words)) || uint64(f.count/64) > uint64(len(words))-f.first/64 {
		return false, fmt.Errorf("%w: MISSING of pages [%#x,+%#x) of memory slot %d, which has %#x", ErrProtocol, f.first, f.count, f.slot, l.slots[f.slot].Pages)
	}
	b, err := c.readPayload(f, missingPages/8)
	if err != nil {
		return false, err
	}
	last := uint64(len(words)) - 1
	for i := range uint64(f.count / 64) {
		w := f.first/64 + i
		word := binary.LittleEndian.Uint64(b[i*8:])
		if w == last && word&^mempage.WordMask(w, 0, l.slots[f.slot].Pages) != 0 {
			return false, fmt.Errorf("%w: MISSING names pages beyond the end of memory slot %d", ErrProtocol, f.slot)
		}
		words[w] |= word
	}
	return false, nil
}

// take returns the list, and begins another.
func (l *missingList) take() [][]uint64 {
	bits := l.bits
	l.bits = nil
	return bits
}

func newBits(slots []Slot) [][]uint64 {
	bits := make([][]uint64, len(slots))
	for i, s := range slots {
		bits[i] = mempage.NewBitmap(s.Pages)
	}
	return bits
}

func countBits(bits [][]uint64) (n uint64) {
	for _, b := range bits {
		n += mempage.Bitmap(b).Count()
	}
	return n
}

// checkWant checks a WANT.
func checkWant(f header, slots []Slot) error {
	if int(f.slot) >= len(slots) || f.length != 0 || f.count == 0 || f.count > maxSpan || f.first >= slots[f.slot].Pages || uint64(f.count) > slots[f.slot].Pages-f.first {
		return fmt.Errorf("%w: WANT of pages [%#x,+%#x) of memory slot %d (%d bytes)", ErrProtocol, f.first, f.count, f.slot, f.length)
	}
	return nil
}
