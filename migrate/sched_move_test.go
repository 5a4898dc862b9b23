package migrate_test

import (
	"fmt"
	"strings"
)

// act is what a move of a schedule does. p is the page of the move.
type act uint8

const (
	guestWrites  act = iota // p; takes it back first, if the guest had freed or hinted it
	guestTakes              // p back, and does not write it
	guestFrees              // p
	guestHints              // p: puts it into the hint queue
	guestSees               // reads the command id: queues STOP under the old one, START under the new one
	guestEnds               // has hinted all, and queues STOP
	deviceWrites            // p, for the guest that uses it
	deviceMarks             // p in the VMM's log, before the guest learns of the write

	hintsTake  // the hint thread takes the next buffer out of the queue
	hintsApply // the hint thread gives the oldest hint that it took to the tracker

	syncs       // the migration thread: Tracker.Sync
	refetches   // p's slot: Tracker.SyncSlot
	picks       // from p on: Tracker.Pick
	reads       // the next picked page
	sends       // the page that was read first
	endsHints   // announces STOP
	beginsEpoch // Tracker.BeginHintEpoch, with a new id
	announces   // that id
	stopsGuest  // vCPUs and devices
	syncsLast
	undoesStop // the guest goes on, and precopy with it

	// KVM, or the VMM's log, does the next part of its current call. Moves of the guest
	// before it come before that part. Before a move of another thread the call ends,
	// since the tracker's mutex is held; during a CLEAR it is free, and hints are applied
	// and other slots fetched.
	goesOn
	acts int = iota
)

var actNames = [acts]string{"guestWrites", "guestTakes", "guestFrees", "guestHints", "guestSees", "guestEnds", "deviceWrites",
	"deviceMarks", "hintsTake", "hintsApply", "syncs", "refetches", "picks", "reads", "sends", "endsHints", "beginsEpoch",
	"announces", "stopsGuest", "syncsLast", "undoesStop", "goesOn"}

// ofPage reports whether the act is done to a page.
func (a act) ofPage() bool {
	return a <= guestHints || a == deviceWrites || a == deviceMarks || a == refetches || a == picks
}

// duringCall reports whether the act may happen during any call of the tracker.
func (a act) duringCall() bool { return a <= hintsTake || a == goesOn }

// move is one step of a schedule. The page is an index into the places of the world, modulo
// their number.
type move struct {
	do   act
	page uint8
}

// schedule is an interleaving of guest, devices, hint thread, migration thread and kernel.
// Any moves are valid: one that cannot be made is skipped, and the end of the migration
// follows the last one.
type schedule []move

// String is the schedule as Go source, to be kept in a test.
func (s schedule) String() string {
	var b strings.Builder
	line := 0
	for _, m := range s {
		text := fmt.Sprintf("{%s, %d},", actNames[m.do], m.page)
		if line+len(text) >= 110 {
			b.WriteString("\n")
			line = 0
		} else if line > 0 {
			b.WriteString(" ")
		}
		b.WriteString(text)
		line += len(text) + 1
	}
	return b.String()
}

// play is a source of moves from a schedule.
type play struct{ rest schedule }

func (p *play) peek(*world) (move, bool) {
	if len(p.rest) == 0 {
		return move{}, false
	}
	return p.rest[0], true
}

func (p *play) made() { p.rest = p.rest[1:] }

// source decides which move is next. peek may be called several times before the move is
// made or skipped.
type source interface {
	peek(w *world) (m move, ok bool)
	made()
}

// place is a page that takes part in schedules.
type place struct {
	slot int
	page uint64
}

func (p place) String() string {
	if p.slot == 0 {
		return fmt.Sprintf("page %d", p.page)
	}
	return fmt.Sprintf("page %d of slot %d", p.page, p.slot)
}

// layout is the memory that schedules are played in.
type layout struct {
	pages                []uint64 // of each slot
	shift                uint
	manual, initiallySet bool
	batch                uint64 // words that one Pick takes at most
}

// layouts are small: what matters is which pages share a word, a chunk, a slot.
var layouts = []layout{
	{pages: []uint64{64}, shift: 6, manual: true, batch: 1},
	{pages: []uint64{128}, shift: 6, manual: true, batch: 1},
	{pages: []uint64{128}, shift: 7, manual: true, batch: 1},
	{pages: []uint64{128}, shift: 7, manual: true, initiallySet: true, batch: 1},
	{pages: []uint64{66}, shift: 6, manual: true, initiallySet: true, batch: 2},
	{pages: []uint64{64, 66}, shift: 7, manual: true, initiallySet: true, batch: 1},
	{pages: []uint64{64, 64}, shift: 6, manual: true, batch: 1},
	{pages: []uint64{128}, shift: 6, batch: 1}, // no manual protection: a GET clears
}

// places are the pages that take part: the first two of every word. The others
// are sent and never written.
func (l layout) places() []place {
	var out []place
	for slot, pages := range l.pages {
		for page := uint64(0); page < pages; page += 64 {
			out = append(out, place{slot, page}, place{slot, page + 1})
		}
	}
	return out
}

func (l layout) String() string {
	s := fmt.Sprintf("slots of %v pages, chunks of %d", l.pages, 1<<l.shift)
	switch {
	case !l.manual:
		s += ", GET clears"
	case l.initiallySet:
		s += ", log initially set"
	}
	return s
}
