package migrate

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"math/bits"
	"net"
	"time"
)

// sender puts pages on the wire. It belongs to one goroutine.
type sender struct {
	ram     RAM
	slots   []Slot
	tracker *Tracker
	conn    *conn
	meter   *meter
	limit   *limiter
	batch   uint64 // pages looked at, at most, for one frame; a multiple of 64

	// sent has a bit for every page of which anything was ever sent: its hole
	// must go as ZERO from then on (R6).
	sent []bitmap

	picked, populated [maxSpan / 64]uint64
	meta              spanMeta
	bufs              net.Buffers
}

func newSender(ram RAM, t *Tracker, c *conn, m *meter, bandwidth uint64) *sender {
	s := &sender{ram: ram, slots: ram.Slots(), tracker: t, conn: c, meter: m, batch: maxSpan}
	for _, slot := range s.slots {
		s.sent = append(s.sent, newBitmap(slot.Pages))
	}
	if bandwidth > 0 {
		s.limit = &limiter{rate: bandwidth}
		// About twenty frames a second, so that the limit is not a stutter.
		s.batch = min(maxSpan, max(64, bandwidth/20/PageSize/64*64))
	}
	return s
}

// sendSlot sends what the tracker wants sent of one slot, from its first page
// to its last.
func (s *sender) sendSlot(ctx context.Context, slot int, limit *limiter) error {
	for from := uint64(0); ; {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		first, n, err := s.tracker.Pick(slot, from, s.batch, s.picked[:])
		if err != nil || n == 0 {
			return err
		}
		before := s.conn.sent.Load()
		if err := s.sendSpan(slot, first, n); err != nil {
			return err
		}
		if err := limit.wait(ctx, s.conn.sent.Load()-before); err != nil {
			return err
		}
		from = first + n
	}
}

// sendSpan sends the picked pages of [first, first+n). They are armed (R1), so
// from here on their content may be read: to be a hole, zero, or data.
func (s *sender) sendSpan(slot int, first, n uint64) error {
	words := spanWords(uint32(n))
	if err := s.ram.Populated(slot, first, n, s.populated[:words]); err != nil {
		return err
	}
	span := s.ram.Bytes(slot, first, n)
	sent := s.sent[slot][first/64:]
	s.bufs = append(s.bufs[:0], nil, nil) // room for header and meta
	var data, zero, hole uint64
	runStart, runEnd := -1, -1 // of data pages, in pages of the span
	for w := range words {
		s.meta.data[w], s.meta.zero[w] = 0, 0
		for left := s.picked[w]; left != 0; left &= left - 1 {
			bit := left & -left
			page := w*64 + bits.TrailingZeros64(left)
			switch {
			case s.populated[w]&bit == 0 && sent[w]&bit == 0:
				hole++ // R6: nothing there has ever been anything but zero
				continue
			case s.populated[w]&bit == 0, isZero(span[page*PageSize:][:PageSize]):
				zero++
				s.meta.zero[w] |= bit
			default:
				data++
				s.meta.data[w] |= bit
				if page != runEnd {
					s.addRun(span, runStart, runEnd)
					runStart = page
				}
				runEnd = page + 1
			}
			sent[w] |= bit
		}
	}
	s.meter.span(data, zero, hole)
	if data+zero == 0 {
		return nil
	}
	s.addRun(span, runStart, runEnd)
	meta := s.meta.encode(uint32(n))
	h := header{typ: framePages, slot: uint16(slot), first: first, count: uint32(n),
		length: uint32(uint64(len(meta)) + data*PageSize)}
	return s.conn.writeSpan(h, meta, s.bufs)
}

func (s *sender) addRun(span []byte, start, end int) {
	if start >= 0 {
		s.bufs = append(s.bufs, span[start*PageSize:end*PageSize])
	}
}

// sendHashes sends the hash of every page, both sides standing still.
func (s *sender) sendHashes(ctx context.Context) error {
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
			if err := s.conn.writeFrame(h, buf[:n*hashSize]); err != nil {
				return err
			}
		}
	}
	return nil
}

const hashSize = 8

// hashUnknown stands for the hash of a page that is not to be compared: the
// guest hinted it, and its content is lost. It is no page's hash, but once in
// 2^64.
var hashUnknown = [hashSize]byte{255, 255, 255, 255, 255, 255, 255, 255}

// hashSpan stores for each page the first 8 bytes of its SHA-256, or zero when
// it reads as zero, so that a hole equals a page of zeros and stays one.
func hashSpan(ram RAM, slot int, first, n uint64, out []byte) error {
	var populated [maxSpan / 64]uint64
	if err := ram.Populated(slot, first, n, populated[:spanWords(uint32(n))]); err != nil {
		return err
	}
	span := ram.Bytes(slot, first, n)
	for i := range int(n) {
		var sum uint64
		if page := span[i*PageSize:][:PageSize]; populated[i/64]>>(i%64)&1 != 0 && !isZero(page) {
			h := sha256.Sum256(page)
			sum = binary.LittleEndian.Uint64(h[:])
		}
		binary.LittleEndian.PutUint64(out[i*hashSize:], sum)
	}
	return nil
}

// limiter spreads bytes over time. A nil limiter does not.
type limiter struct {
	rate uint64 // bytes a second
	next time.Time
}

// wait returns when n bytes more have had their time.
func (l *limiter) wait(ctx context.Context, n uint64) error {
	if l == nil || n == 0 {
		return nil
	}
	now := time.Now()
	if l.next.Before(now) {
		l.next = now
	}
	l.next = l.next.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	t := time.NewTimer(time.Until(l.next))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
