package migrate_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
)

// The model migrates a simulated memory with a real tracker and its own sender, one step at
// a time and in any order: what the guest, the kernel, the devices and the engine do at the
// same time on real hardware is a sequence of small steps here. At the end the destination
// must have the source's bytes.

// setup is the start of a run of the model.
type setup struct {
	pages         []uint64 // of each slot
	manual        bool
	initiallySet  bool
	holesUnknown  bool
	shift         uint
	filled        bool // guest memory has content before tracking starts
	breakWith     flaw
	maxBatchWords uint64
}

// flaw is an error of the engine. Each breaks one rule of docs/migration.md.
type flaw string

const (
	none              flaw = ""
	readBeforeClear   flaw = "R1: content is read before its page is armed"
	holeBeforeClear   flaw = "R1: holes are looked up before the page is armed"
	clearAllOnes      flaw = "R2: a CLEAR passes every bit of its chunk"
	noWrittenSince    flaw = "R3: hints ignore what was written since the announcement"
	announceFirst     flaw = "R3: the id is announced before the pages are armed"
	announceUnarmed   flaw = "R3: the id is announced and what was fetched is not armed"
	anyID             flaw = "R3: the id of a hint is not checked"
	clearAtHint       flaw = "R3: fetched bits are cleared when the hint is processed"
	hintFetched       flaw = "R3: a hint takes pages out whose bits are fetched"
	syncOverwrites    flaw = "R4: a sync overwrites what must be sent"
	takeAfterReading  flaw = "R4: a page leaves what must be sent after it was read"
	noLastSync        flaw = "R5: the last sync is skipped"
	portAfterLastSync flaw = "R5: a pending port access completes after the last sync"
	devicesNotDrained flaw = "R5: device I/O completes after the last sync"
	holesSkipped      flaw = "R6: a hole is skipped whatever was sent before"
	punchUnmarked     flaw = "R6: punching does not mark the VMM's log"
	zeroIgnored       flaw = "R6: the destination does not apply ZERO"
)

var flaws = []flaw{readBeforeClear, holeBeforeClear, clearAllOnes, noWrittenSince, announceFirst, announceUnarmed, anyID,
	clearAtHint, hintFetched, syncOverwrites, takeAfterReading, noLastSync, portAfterLastSync, devicesNotDrained,
	holesSkipped, punchUnmarked, zeroIgnored}

// errInjected is a failure that the model caused. The tracker may report it and must lose
// nothing.
var errInjected = errors.New("injected")

// onesLog passes all ones to every CLEAR (flaw clearAllOnes).
type onesLog struct{ migrate.DirtyLog }

func (l onesLog) ClearDirtyLog(slot int, first, n uint64, bitmap []uint64) error {
	ones := make([]uint64, len(bitmap))
	for i := range ones {
		ones[i] = ^uint64(0)
	}
	return l.DirtyLog.ClearDirtyLog(slot, first, n, ones)
}

// batch is what one Pick returned and was not read yet.
type batch struct {
	slot     int
	first, n uint64
	picked   []uint64
	// For the flaws: what was read before the pick, and what is taken out after the
	// reading.
	content []byte
	holes   []uint64
	late    []uint64
}

// queued is a hint on its way from the guest to the host.
type queued struct {
	id       uint32
	slot     int
	first, n uint64
}

type model struct {
	setup
	src, dst *simtest.Memory
	tracker  *migrate.Tracker
	random   *rand.Rand // of the step, so that a step always does the same

	batches []*batch
	sent    [][]bool // something was sent for the page (R6)
	free    [][]bool // the guest gave the content up and did not write the page since
	marks   []func() // writes of kernel and devices that have landed and are not in a log yet

	lastID uint32 // announced last
	seenID uint32 // the guest's
	unborn uint32 // announced, not begun (flaw announceFirst)
	queue  []queued

	failing string // the call that fails next, "" for none
	window  int    // writes that fall into the next CLEAR
}

func newModel(s setup) (*model, error) {
	layout := simtest.Layout{ManualProtect: s.manual, InitiallySet: s.initiallySet, HolesUnknown: s.holesUnknown}
	gpa := uint64(0)
	for _, pages := range s.pages {
		layout.Slots = append(layout.Slots, migrate.Slot{GPA: gpa, Pages: pages})
		gpa += pages * mempage.Size
	}
	src, err := simtest.NewMemory(layout)
	if err != nil {
		return nil, err
	}
	dst, err := simtest.NewMemory(layout)
	if err != nil {
		return nil, errors.Join(err, src.Close())
	}
	m := &model{setup: s, src: src, dst: dst, random: rand.New(rand.NewPCG(1, 2))}
	for slot, pages := range s.pages {
		m.sent = append(m.sent, make([]bool, pages))
		m.free = append(m.free, make([]bool, pages))
		for page := range pages {
			if s.filled && page%3 != 0 {
				src.GuestWrite(slot, page)
			}
		}
	}
	src.Hooks.Window = func(slot int, first, n uint64) {
		for ; m.window > 0; m.window-- {
			m.guestWrite(slot, first+m.random.Uint64N(n))
		}
	}
	fail := func(name string) error {
		if m.failing != name {
			return nil
		}
		m.failing = ""
		return errInjected
	}
	src.Hooks.FailFetch = func(int) error { return fail("fetch") }
	src.Hooks.FailFetchVMM = func(int) error { return fail("fetch vmm") }
	src.Hooks.FailClear = func(int, uint64, uint64) error { return fail("clear") }
	var log migrate.DirtyLog = src
	if s.breakWith == clearAllOnes {
		log = onesLog{src}
	}
	if m.tracker, err = migrate.NewTracker(layout.Slots, log, s.shift); err == nil {
		err = m.tracker.Start()
	}
	if err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *model) close() {
	m.src.Close()
	m.dst.Close()
}

// check checks the tracker's invariants between two steps.
func (m *model) check() error {
	if m.breakWith != none {
		return nil
	}
	return m.tracker.Check(func(slot int, page uint64) bool {
		armed, reported := m.src.Armed(slot, page)
		return armed || reported
	})
}

// The guest.

func (m *model) guestWrite(slot int, page uint64) {
	m.free[slot][page] = false // taken back, if it was given up
	m.src.GuestWrite(slot, page)
}

func (m *model) guestZero(slot int, page uint64) {
	m.free[slot][page] = false
	m.src.GuestZero(slot, page)
}

// see lets the guest read the command id.
func (m *model) see() { m.seenID = m.lastID }

// hint lets the guest give pages up and queue the hint.
func (m *model) hint(slot int, first, n uint64) {
	if m.seenID == 0 {
		return
	}
	n = min(n, m.pages[slot]-first)
	for page := first; page < first+n; page++ {
		m.free[slot][page] = true
	}
	m.queue = append(m.queue, queued{m.seenID, slot, first, n})
}

// takeBack lets the guest allocate and write a page whose hint is queued.
func (m *model) takeBack(i int, offset uint64) {
	if len(m.queue) > 0 {
		h := m.queue[i%len(m.queue)]
		m.guestWrite(h.slot, h.first+offset%h.n)
	}
}

// The kernel and the devices.

func (m *model) kernelWrite(slot int, page uint64) {
	m.free[slot][page] = false
	m.marks = append(m.marks, m.src.KernelWrite(slot, page))
}

func (m *model) deviceWrite(slot int, page uint64) {
	m.free[slot][page] = false
	m.marks = append(m.marks, m.src.DeviceWrite(slot, page))
}

func (m *model) mark(i int) {
	if len(m.marks) > 0 {
		i %= len(m.marks)
		m.marks[i]()
		m.marks = append(m.marks[:i], m.marks[i+1:]...)
	}
}

func (m *model) markAll() {
	for len(m.marks) > 0 {
		m.mark(0)
	}
}

func (m *model) punch(slot int, first, n uint64) {
	n = min(n, m.pages[slot]-first)
	for page := first; page < first+n; page++ {
		m.free[slot][page] = false
	}
	m.src.Punch(slot, first, n, m.breakWith != punchUnmarked)
}

// The host's side of the hints.

func (m *model) announce() error {
	id := m.lastID + 1
	switch m.breakWith {
	case announceFirst:
		m.unborn = id
	case announceUnarmed, hintFetched, clearAtHint:
		m.tracker.BeginHintEpochUnarmed(id)
	default:
		if err := m.tracker.BeginHintEpoch(id); err != nil {
			return err
		}
	}
	m.lastID = id
	return nil
}

func (m *model) processHint(i int, again bool) error {
	if len(m.queue) == 0 {
		return nil
	}
	if m.unborn != 0 {
		if err := m.tracker.BeginHintEpoch(m.unborn); err != nil {
			return err
		}
		m.unborn = 0
	}
	i %= len(m.queue)
	h := m.queue[i]
	if !again {
		m.queue = append(m.queue[:i], m.queue[i+1:]...)
	}
	switch m.breakWith {
	case noWrittenSince:
		m.tracker.ForgetWritten()
	case anyID:
		h.id = m.tracker.HintEpoch()
	case hintFetched, clearAtHint:
		return m.tracker.HintAll(h.id, h.slot, h.first, h.n, m.breakWith == clearAtHint)
	}
	m.tracker.Hint(h.id, h.slot, h.first, h.n)
	return nil
}

// The engine.

func (m *model) sync() error {
	if m.breakWith == syncOverwrites {
		m.tracker.ForgetToSend()
	}
	return m.tracker.Sync()
}

func (m *model) syncSlot(slot int) error {
	_, err := m.tracker.SyncSlot(slot)
	return err
}

// pick takes a batch, to be read by later steps. It returns how far it got.
func (m *model) pick(slot int, from, words uint64) (next uint64, err error) {
	b := &batch{slot: slot, picked: make([]uint64, words)}
	for i := range b.picked {
		b.picked[i] = ^uint64(0) // as if left over from the batch before
	}
	if m.breakWith == readBeforeClear {
		b.content = bytes.Clone(m.src.Bytes(slot, 0, m.pages[slot]))
	}
	if m.breakWith == readBeforeClear || m.breakWith == holeBeforeClear {
		b.holes = make([]uint64, (m.pages[slot]+63)/64)
		if err := m.src.Populated(slot, 0, m.pages[slot], b.holes); err != nil {
			return 0, err
		}
	}
	b.first, b.n, err = m.tracker.Pick(slot, from, words*64, b.picked)
	if err != nil {
		return 0, err
	}
	if err := checkBatch(b, from, m.pages[slot]); err != nil {
		return 0, err
	}
	if b.n > 0 {
		if m.breakWith == takeAfterReading {
			m.tracker.PutBack(slot, b.first, b.picked)
			b.late = slices.Clone(b.picked)
		}
		m.batches = append(m.batches, b)
	}
	return b.first + b.n, nil
}

// leaveHoles picks pages and puts those back that are to be sent: what the sender does with
// large holes. The guest writes between the steps.
func (m *model) leaveHoles(slot int, from, words uint64) error {
	picked := make([]uint64, words)
	first, n, err := m.tracker.Pick(slot, from, words*64, picked)
	if err != nil || n == 0 {
		return err
	}
	for i := range n {
		if m.random.IntN(16) == 0 {
			m.guestWrite(slot, first+m.random.Uint64N(n))
		}
		next, err := m.src.NextPopulated(slot, first+i, 1)
		if err != nil {
			return err
		}
		if next > first+i && !m.sent[slot][first+i] {
			picked[i/64] &^= 1 << (i % 64)
		}
	}
	m.tracker.PutBack(slot, first, picked)
	return nil
}

// checkBatch checks the range that Pick returned against its documentation.
func checkBatch(b *batch, from, pages uint64) error {
	words := uint64(len(b.picked))
	switch {
	case b.n == 0:
		return nil
	case b.first%64 != 0, b.first+b.n > pages, b.n > words*64, b.n%64 != 0 && b.first+b.n != pages, b.first+63 < from:
	case b.picked[0] == 0:
	default:
		for i := b.n; i < words*64; i++ {
			if b.picked[i/64]>>(i%64)&1 != 0 {
				return fmt.Errorf("picked page %#x is outside [%#x,+%#x)", b.first+i, b.first, b.n)
			}
		}
		return nil
	}
	return fmt.Errorf("picked [%#x,+%#x) of %#x pages from %#x with %d words", b.first, b.n, pages, from, words)
}

// read sends up to n pages of a batch: it reads each and applies it at the destination, in
// that order, like one connection. meanwhile is what the guest does to the page in
// between.
func (m *model) read(i int, n uint64, meanwhile func(slot int, page uint64)) error {
	if len(m.batches) == 0 {
		return nil
	}
	i %= len(m.batches)
	b := m.batches[i]
	for p := range b.n {
		if b.picked[p/64]>>(p%64)&1 == 0 {
			continue
		}
		if n == 0 {
			return nil
		}
		n--
		b.picked[p/64] &^= 1 << (p % 64)
		if err := m.send(b, b.first+p, meanwhile); err != nil {
			return err
		}
	}
	m.batches = append(m.batches[:i], m.batches[i+1:]...)
	if m.breakWith == takeAfterReading {
		m.tracker.Drop(b.slot, b.first, b.late)
	}
	return nil
}

var zeroPage [mempage.Size]byte

// send is the reference sender for one page.
func (m *model) send(b *batch, page uint64, meanwhile func(slot int, page uint64)) error {
	slot := b.slot
	content := m.src.Bytes(slot, page, 1)
	if b.content != nil {
		content = b.content[page*mempage.Size:][:mempage.Size]
	}
	var populated [1]uint64
	if err := m.src.Populated(slot, page, 1, populated[:]); err != nil {
		return err
	}
	if b.holes != nil {
		populated[0] = b.holes[page/64] >> (page % 64) & 1
	}
	meanwhile(slot, page)
	to := m.dst.Bytes(slot, page, 1)
	switch {
	case populated[0] == 0 && (!m.sent[slot][page] || m.breakWith == holesSkipped):
		return nil // R6
	case populated[0] == 0 || bytes.Equal(content, zeroPage[:]):
		meanwhile(slot, page)
		if m.breakWith != zeroIgnored {
			if err := m.dst.Zero(slot, page, 1); err != nil {
				return err
			}
		}
	default:
		half := copy(to[:mempage.Size/2], content)
		meanwhile(slot, page)
		copy(to[half:], content[half:])
	}
	m.sent[slot][page] = true
	return nil
}

func undisturbed(int, uint64) {}

// finish is the switchover: R5, the last sync, and all that is left.
func (m *model) finish() error {
	m.failing, m.window = "", 0
	pending := func() {
		for range 2 {
			slot := m.random.IntN(len(m.pages))
			m.kernelWrite(slot, m.random.Uint64N(m.pages[slot]))
			m.marks[len(m.marks)-1]()
			m.marks = m.marks[:len(m.marks)-1]
		}
	}
	if m.breakWith != portAfterLastSync {
		pending()
	}
	if m.breakWith != devicesNotDrained {
		m.markAll()
	}
	if m.breakWith != noLastSync {
		if err := m.sync(); err != nil {
			return err
		}
	}
	if m.breakWith == portAfterLastSync {
		pending()
	}
	if m.breakWith == devicesNotDrained {
		m.markAll()
	}
	if err := m.check(); err != nil {
		return err
	}
	if m.random.IntN(2) == 0 { // hints may be late; the balloon should stop before, and need not
		for len(m.queue) > 0 {
			if err := m.processHint(0, false); err != nil {
				return err
			}
		}
	}
	for slot := range m.pages {
		for from := uint64(0); from < m.pages[slot]; {
			next, err := m.pick(slot, from, max(1, m.maxBatchWords))
			if err != nil {
				return err
			}
			from = next
		}
	}
	for len(m.batches) > 0 {
		if err := m.read(0, ^uint64(0), undisturbed); err != nil {
			return err
		}
	}
	if left := m.tracker.Remaining(); left != 0 {
		return fmt.Errorf("%d pages remain after the last pick", left)
	}
	return m.check()
}

// losses are the pages that are wrong at the destination and that the guest may read.
func (m *model) losses() []simtest.Loss {
	var lost []simtest.Loss
	for _, l := range simtest.Compare(m.src, m.dst) {
		if !m.free[l.Slot][l.Page] {
			lost = append(lost, l)
		}
	}
	return lost
}
