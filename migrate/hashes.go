package migrate

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/govmm/govmm/mempage"
)

// sendHashes sends the hash of every page while the guest runs on neither side.
func (s *sender) sendHashes(ctx context.Context, c *conn) error {
	buf := make([]byte, maxSpan*hashSize)
	for slot, info := range s.slots {
		for first := uint64(0); first < info.Pages; first += maxSpan {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			n := min(maxSpan, info.Pages-first)
			if err := hashSpan(s.ram, slot, first, n, buf); err != nil {
				return err
			}
			s.tracker.maskHinted(slot, first, n, buf)
			h := header{typ: frameHashes, slot: uint16(slot), first: first, count: uint32(n)}
			if err := c.writeFrame(h, buf[:n*hashSize]); err != nil {
				return err
			}
		}
	}
	return nil
}

const hashSize = 8

// hashUnknown stands for the hash of a page that is not compared, since a hint kept it
// off the wire. A page has this hash once in 2^64.
var hashUnknown = [hashSize]byte{255, 255, 255, 255, 255, 255, 255, 255}

// hashSpan stores for each page the first 8 bytes of its SHA-256, or zero if it reads
// as zero, so that a hole equals a page of zeros.
func hashSpan(ram RAM, slot int, first, n uint64, out []byte) error {
	var populated [maxSpan / 64]uint64
	if err := ram.Populated(slot, first, n, populated[:spanWords(uint32(n))]); err != nil {
		return err
	}
	span := ram.Bytes(slot, first, n)
	return guard(ram, slot, first, span, func() error {
		for i := range int(n) {
			var sum uint64
			if page := span[i*mempage.Size:][:mempage.Size]; populated[i/64]>>(i%64)&1 != 0 && !isZero(page) {
				h := sha256.Sum256(page)
				sum = binary.LittleEndian.Uint64(h[:])
			}
			binary.LittleEndian.PutUint64(out[i*hashSize:], sum)
		}
		return nil
	})
}

// compareHashes records the pages that differ from the source.
func (s *session) compareHashes(target Target, f reply) error {
	if err := f.span(s.slots); err != nil {
		return err
	}
	if !slices.Contains(s.features, featureVerifyPages) || int(f.length) != int(f.count)*hashSize {
		return s.unexpected(f.header, "what CONFIG names")
	}
	theirs := f.payload
	ours := make([]byte, len(theirs))
	if err := hashSpan(target, int(f.slot), f.first, uint64(f.count), ours); err != nil {
		return err
	}
	for i := 0; i < len(ours); i += hashSize {
		if bytes.Equal(ours[i:][:hashSize], theirs[i:][:hashSize]) || [hashSize]byte(theirs[i:]) == hashUnknown {
			continue
		}
		s.nWrong++
		if len(s.wrong) < 8 {
			page := f.first + uint64(i/hashSize)
			s.wrong = append(s.wrong, fmt.Sprintf("%#x", s.slots[f.slot].GPA+page*mempage.Size))
		}
	}
	return nil
}
