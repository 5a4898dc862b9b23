package snapshot

import (
	"encoding/binary"
	"fmt"

	"github.com/govmm/govmm/mempage"
)

// What the guest was writing when the snapshot was made is read first when it is restored
// lazily: ranges of pages of the file of memory, each 16 bytes, little-endian: the first
// page's number and how many there are. They do not overlap, and are in order.

const (
	maxHot   = 64 << 10 // ranges
	hotBytes = 16       // of a range
	// hotGap is the most pages between two ranges that are made one.
	hotGap = 8
)

// Range is a range of pages in the file of memory.
type Range struct{ First, Pages uint64 }

// hotRanges makes ranges of the bits that are set: at most maxHot, by larger gaps if there
// are more.
func hotRanges(hot mempage.Bitmap) (list []Range) {
	for gap := uint64(hotGap); ; gap *= 8 {
		list = list[:0]
		end := hot.Bits()
		for at := hot.NextSet(0, end); at < end; at = hot.NextSet(at+1, end) {
			if n := len(list); n > 0 && at-(list[n-1].First+list[n-1].Pages) <= gap {
				list[n-1].Pages = at + 1 - list[n-1].First
				continue
			}
			if list = append(list, Range{at, 1}); len(list) > maxHot {
				break
			}
		}
		if len(list) <= maxHot {
			return list
		}
	}
}

func encodeHot(list []Range) []byte {
	b := make([]byte, 0, len(list)*hotBytes)
	for _, r := range list {
		b = binary.LittleEndian.AppendUint64(b, r.First)
		b = binary.LittleEndian.AppendUint64(b, r.Pages)
	}
	return b
}

// parseHot reads ranges of a memory of so many pages.
func parseHot(b []byte, pages uint64) (list []Range, err error) {
	if len(b)%hotBytes != 0 || len(b) > maxHot*hotBytes {
		return nil, fmt.Errorf("%s of %d bytes: must be a multiple of %d, at most %d", hotFile, len(b), hotBytes, maxHot*hotBytes)
	}
	next := uint64(0)
	for ; len(b) > 0; b = b[hotBytes:] {
		r := Range{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
		if r.First < next || r.Pages == 0 || r.First >= pages || r.Pages > pages-r.First {
			return nil, fmt.Errorf("%s: %d pages from page %d: expected a range behind page %d, of %d pages of memory", hotFile, r.Pages, r.First, next, pages)
		}
		next = r.First + r.Pages
		list = append(list, r)
	}
	return list, nil
}
