package migrate_test

import (
	"fmt"
	"math/bits"
	"slices"

	"github.com/govmm/govmm/migrate"
)

// use is what the guest does with a page.
type use uint8

const (
	free  use = iota // not allocated
	inUse            // allocated
	given            // hinted; the guest may take it back at any time
)

// The balloon's command ids as virtio 1.2 section 5.5.6.5 has them.
const (
	idStop  = 0
	idFirst = 2
)

// buffer is a buffer in the hint queue.
type buffer struct {
	kind bufferKind
	page uint8
}

type bufferKind uint8

const (
	startBuffer bufferKind = iota // holds the id: the host reads the driver's variable
	pageBuffer
	stopBuffer
)

// queueLen is how many buffers the guest queues before it waits.
const queueLen = 12

// taken is a hint that the hint thread took out of the queue.
type taken struct {
	id   uint32
	page uint8
}

// maxEpochs bounds the ids of one migration.
const maxEpochs = 5

// outcome is what a schedule came to.
type outcome struct {
	lost   []uint8 // pages whose last write the destination must have, and has not
	ruined []uint8 // those of lost that were taken back and written after the hint, and are in use
	undone []uint8 // hinted, neither written nor marked since the epoch began, and a fetch put them back
}

func (o outcome) any() bool { return len(o.lost)+len(o.undone) > 0 }

// world plays schedules: a guest with its driver and devices, the host's two threads around
// a real tracker, a dirty log, a wire, a destination. Only the schedule determines the
// interleaving; there is one goroutine.
type world struct {
	layout
	policy  policy
	log     *schedLog
	tracker *migrate.Tracker
	hot     []place
	hotBits [][]uint64 // places, as bitmaps of the slots

	now uint64 // numbers what happens

	// The guest, its driver, its devices. Content is the number of the write.
	content []uint64
	use     []use
	landed  []bool   // a device's write that is not marked yet
	marked  []uint64 // when a device's write was marked last
	hinted  []uint64 // when the page was hinted last
	given   []uint64 // when the id of that hint was announced
	seen    uint32   // command id that the driver has read
	active  uint32   // the driver's variable that every START buffer points to
	session bool     // START is in the queue, and STOP is not yet
	queue   []buffer

	// The host's balloon and hint thread.
	config   uint32 // command id that the guest can read
	started  uint32 // id of the hints that come out of the queue, 0 for none
	answered bool   // the driver's STOP under the last id was taken
	lastSeen uint32 // id in the START that was taken last
	hand     []taken

	// The migration thread.
	lastID    uint32
	begun     bool // lastID has an epoch, and is not announced
	epochAt   uint64
	announced [idFirst + maxEpochs]uint64 // when each id was
	batch     [][]uint64                  // picked and not read, of each slot
	picked    []uint64
	wire      []sent
	stopped   bool
	last      bool // the last sync is done
	got       []uint64
	coldGot   [][]uint64 // pages that are in no place, and were picked

	src    source // of the moves; nil while there is none to come
	inCall bool   // a call of the tracker runs
	held   bool   // and holds its mutex during the calls of the log
	inHint bool   // and it is the hint thread's

	out     []bool // pages that a hint took out, not written since the epoch began
	outcome outcome
	seenBy  coverage

	// Of a printed schedule; nil in a search.
	print func(who, what string)
}

// sent is a page on the wire.
type sent struct {
	page    uint8
	content uint64
}

func newWorld(l layout, p policy) *world {
	w := &world{layout: l, policy: p, hot: l.places()}
	w.log = newSchedLog(l.manual, l.initiallySet, l.pages...)
	w.log.pause = w.pause
	var err error
	if w.tracker, err = migrate.NewTracker(w.log.layout(), w.log, l.shift); err != nil {
		panic(err)
	}
	n := len(w.hot)
	w.content, w.got, w.given, w.marked = make([]uint64, n), make([]uint64, n), make([]uint64, n), make([]uint64, n)
	w.hinted = make([]uint64, n)
	w.use, w.landed, w.out = make([]use, n), make([]bool, n), make([]bool, n)
	w.picked = make([]uint64, l.batch)
	for _, pages := range l.pages {
		words := (pages + 63) / 64
		w.hotBits = append(w.hotBits, make([]uint64, words))
		w.batch = append(w.batch, make([]uint64, words))
		w.coldGot = append(w.coldGot, make([]uint64, words))
	}
	for _, p := range w.hot {
		w.hotBits[p.slot][p.page/64] |= 1 << (p.page % 64)
	}
	return w
}

// start resets the world: every page was written once and freed, and the dirty log has just
// been turned on.
func (w *world) start() error {
	w.now = 100
	for i := range w.hot {
		w.content[i], w.got[i], w.given[i], w.hinted[i], w.marked[i] = uint64(i)+1, 0, 0, 0, 0
		w.use[i], w.landed[i], w.out[i] = free, false, false
	}
	w.seen, w.active, w.session, w.queue = idStop, idStop, false, w.queue[:0]
	w.config, w.started, w.answered, w.lastSeen, w.hand = idStop, 0, false, 0, w.hand[:0]
	w.lastID, w.begun, w.epochAt, w.announced = idFirst-1, false, 0, [len(w.announced)]uint64{}
	for slot := range w.pages {
		clear(w.batch[slot])
		clear(w.coldGot[slot])
	}
	w.wire, w.stopped, w.last = w.wire[:0], false, false
	w.src, w.inCall, w.held, w.inHint = nil, false, false, false
	w.outcome = outcome{}
	return w.tracker.Start()
}

// run plays a migration from its start to the destination's first instruction.
func (w *world) run(src source) (outcome, error) {
	if err := w.start(); err != nil {
		return outcome{}, err
	}
	w.src = src
	for {
		m, ok := src.peek(w)
		if !ok {
			break
		}
		src.made()
		if m = w.place(m); !w.can(m) {
			continue
		}
		if err := w.do(m); err != nil {
			return outcome{}, err
		}
	}
	w.src = nil
	err := w.finish()
	return w.outcome, err
}

// place makes a page of the move's number.
func (w *world) place(m move) move {
	m.page %= uint8(len(w.hot))
	return m
}

// pause is called by the log before each part of a call, and makes the moves that come
// there.
func (w *world) pause() {
	for w.src != nil {
		m, ok := w.src.peek(w)
		if !ok || !w.duringCall(w.place(m)) {
			return
		}
		w.src.made()
		if m.do == goesOn {
			return
		}
		if m = w.place(m); w.can(m) {
			if err := w.do(m); err != nil {
				panic(err) // none of these moves fails
			}
			w.seenBy.inCalls++
			if !m.do.duringCall() {
				w.seenBy.inClears++
			}
		}
	}
}

// duringCall reports whether a move may be made during the call of the tracker that is
// under way.
func (w *world) duringCall(m move) bool {
	if m.do.duringCall() {
		return true
	}
	if w.log.clearing < 0 || w.held {
		return false
	}
	return m.do == hintsApply && !w.inHint && !w.policy.clearsAtHint || m.do == refetches && w.hot[m.page].slot != w.log.clearing
}

// can reports whether a move can be made now.
func (w *world) can(m move) bool {
	p := m.page
	if w.inCall && !w.duringCall(m) {
		return false
	}
	if w.stopped && m.do <= deviceMarks {
		return false
	}
	switch m.do {
	case guestWrites:
		return true
	case guestTakes:
		return w.use[p] != inUse
	case guestFrees:
		return w.use[p] == inUse && !w.landed[p]
	case guestHints:
		return w.session && w.use[p] == free && len(w.queue) < queueLen
	case guestSees:
		return w.seen != w.config && len(w.queue)+1 < queueLen
	case guestEnds:
		return w.session && len(w.queue) < queueLen
	case deviceWrites:
		return !w.landed[p]
	case deviceMarks:
		return w.landed[p]
	case hintsTake:
		return len(w.queue) > 0 && !w.inHint
	case hintsApply:
		return len(w.hand) > 0
	case syncs, refetches:
		return !w.last
	case picks:
		return !w.reading()
	case reads:
		return w.reading()
	case sends:
		return len(w.wire) > 0
	case endsHints:
		return w.config != idStop
	case beginsEpoch:
		return !w.begun && w.lastID+1 < uint32(len(w.announced)) && !w.stopped &&
			(w.lastID < idFirst || w.policy.noDance || w.config == idStop && w.answered)
	case announces:
		return w.begun
	case stopsGuest:
		return !w.stopped
	case syncsLast:
		return w.stopped && !w.last
	case undoesStop:
		return w.stopped
	case goesOn:
		return w.inCall
	}
	return false
}

// underWay reports whether the page was picked and has not landed.
func (w *world) underWay(page uint8) bool {
	p := w.hot[page]
	return w.batch[p.slot][p.page/64]>>(p.page%64)&1 != 0 ||
		slices.ContainsFunc(w.wire, func(s sent) bool { return s.page == page })
}

func (w *world) reading() bool {
	for _, b := range w.batch {
		for _, word := range b {
			if word != 0 {
				return true
			}
		}
	}
	return false
}

// do makes a move that can be made.
func (w *world) do(m move) error {
	switch {
	case m.do <= deviceMarks:
		w.guest(m.do, m.page)
		return nil
	case m.do <= hintsApply:
		return w.hintThread(m.do)
	}
	return w.migrationThread(m.do, m.page)
}

// finish completes the migration from where the schedule left it: guest stopped, last sync,
// the rest sent. Then it compares.
func (w *world) finish() error {
	for _, do := range []act{stopsGuest, syncsLast} {
		if m := (move{do: do}); w.can(m) {
			if err := w.do(m); err != nil {
				return err
			}
		}
	}
	print := w.print // what is left goes in one line
	w.print = nil
	defer func() { w.print = print }()
	w.drain()
	for slot, pages := range w.pages {
		for from := uint64(0); from < pages; {
			next, err := w.pick(slot, from)
			if err != nil {
				return err
			}
			w.drain()
			from = next
		}
	}
	if left := w.tracker.Remaining(); left != 0 {
		return fmt.Errorf("%d pages remain after the last pick", left)
	}
	for slot, pages := range w.pages {
		for i, got := range w.coldGot[slot] {
			if all := ^uint64(0) >> (64 - min(64, pages-uint64(i)*64)); got|w.hotBits[slot][i] != all {
				return fmt.Errorf("slot %d: of the pages that nobody wrote, %#x came of word %d", slot, got, i)
			}
		}
	}
	w.print = print
	w.say("migration", "sends all that is left")
	for i := range w.hot {
		switch {
		case w.got[i] == w.content[i]:
		case w.content[i] < w.given[i]: // hinted, and not modified since its id was announced
			w.seenBy.spared++
		default:
			w.outcome.lost = append(w.outcome.lost, uint8(i))
			if w.use[i] == inUse && w.content[i] > w.hinted[i] {
				w.outcome.ruined = append(w.outcome.ruined, uint8(i))
			}
			w.say("lost", "%v: its last write is #%d, the destination has #%d", w.hot[i], w.content[i], w.got[i])
		}
	}
	return nil
}

func (w *world) drain() {
	for w.reading() {
		w.read()
	}
	for len(w.wire) > 0 {
		w.send()
	}
}

// say prints a line of a schedule.
func (w *world) say(who, format string, args ...any) {
	if w.print != nil {
		w.print(who, fmt.Sprintf(format, args...))
	}
}

// hotIn lists the places of a bitmap.
func (w *world) hotIn(slot int, first uint64, b []uint64) []int {
	var out []int
	for i, p := range w.hot {
		if at := p.page - first; p.slot == slot && p.page >= first && at/64 < uint64(len(b)) && b[at/64]>>(at%64)&1 != 0 {
			out = append(out, i)
		}
	}
	return out
}

// lowest is the first page of the batch.
func (w *world) lowest() (place, bool) {
	for slot, b := range w.batch {
		for i, word := range b {
			if word != 0 {
				return place{slot, uint64(i)*64 + uint64(bits.TrailingZeros64(word))}, true
			}
		}
	}
	return place{}, false
}

// index is the number of a place.
func (w *world) index(p place) uint8 {
	for i, q := range w.hot {
		if p == q {
			return uint8(i)
		}
	}
	panic("no place of the schedule's")
}
