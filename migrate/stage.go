package migrate

import (
	"context"
	"math/bits"

	"github.com/govmm/govmm/mempage"
)

// stage is a stretch of a slot that is made ready for its pages to be picked: the log of
// the slot has been fetched, its chunks are armed, and in the first pass large holes are
// left out. A pass goes from stage to stage. The next one is prepared by a goroutine of
// its own while the last pages of the one before are picked and sent, so no worker waits
// for the fetch of a slot, or for a CLEAR of 1 GiB.
type stage struct {
	slot      int    // as many as there are: the pass is over
	from, end uint64 // pages to be picked; from moves on as they are
	next      *stage // nil: not begun
	ready     chan struct{}
	err       error // once ready is closed
}

// prepare begins to prepare the next stage that has pages to send, at or after a page.
// Stages are prepared one at a time.
func (s *sender) prepare(ctx context.Context, slot int, from uint64) *stage {
	st := &stage{slot: slot, from: from, ready: make(chan struct{})}
	s.preparing.Go(func() {
		defer close(st.ready)
		st.err = s.advance(ctx, st)
	})
	return st
}

// advance moves a stage to the next stretch that has pages to send.
func (s *sender) advance(ctx context.Context, st *stage) error {
	for ; st.slot < len(s.slots); st.slot, st.from = st.slot+1, 0 {
		if st.from == 0 && s.before != nil {
			if err := s.before(st.slot); err != nil {
				return err
			}
		}
		pages := s.slots[st.slot].Pages
		for {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			next := s.tracker.NextToSend(st.slot, st.from, pages)
			if next == pages {
				break
			}
			// Stretches begin and end where spans do.
			st.from = max(st.from, next&^(maxSpan-1))
			st.end = min(pages, st.from&^(s.stretch-1)+s.stretch)
			if !s.leaps {
				return s.tracker.Arm(st.slot, st.from, st.end-st.from)
			}
			if most := min(pages, st.from&^(maxClear-1)+maxClear); s.tracker.Armed(st.slot, st.from, most-st.from) {
				st.end = most
			}
			if err := s.leaveHoles(st.slot, st.from, st.end); err != nil {
				return err
			}
			if s.tracker.NextToSend(st.slot, st.from, st.end) < st.end {
				return nil
			}
			st.from = st.end
		}
	}
	return nil
}

// leaveHoles takes out of what must be sent the spans of [from, end) in which no page is
// populated. They are picked before that is looked up (R1), and what was sent before is
// left in (R6). The rest is put back: it is looked at again when it is sent.
func (s *sender) leaveHoles(slot int, from, end uint64) error {
	first, n, err := s.tracker.PickBefore(slot, from, end, maxClear, s.picked[:])
	if err != nil || n == 0 {
		return err
	}
	picked, sent := s.picked[:mempage.Words(n)], s.sent[slot][first/mempage.WordBits:]
	var holes int
	for at, end := first, first+n; at < end; {
		next, err := s.holes.NextPopulated(slot, at, end-at)
		if err != nil {
			return err
		}
		if next < end {
			next = max(at, next&^(maxSpan-1))
		}
		for w := (at - first) / mempage.WordBits; w < mempage.Words(next-first); w++ {
			hole := picked[w] &^ sent[w]
			holes += bits.OnesCount64(hole)
			picked[w] &^= hole
		}
		at = next&^(maxSpan-1) + maxSpan
	}
	s.tracker.PutBack(slot, first, picked)
	s.meter.span(0, 0, uint64(holes))
	return nil
}
