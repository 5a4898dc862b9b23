package migrate_test

import (
	"testing"

	"github.com/govmm/govmm/migrate/simtest"
)

// scenario is a shortest sequence of steps in which one flaw loses a page.
type scenario struct {
	flaw  flaw
	setup setup
	story func(t *testing.T, m *model)
	lost  uint64 // page of slot 0
}

// must fails the test on an error of the model's steps.
func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// pickFrom picks from a page on and leaves the reading to a later step.
func pickFrom(t *testing.T, m *model, from uint64) {
	t.Helper()
	_, err := m.pick(0, from, 1)
	must(t, err)
}

// readAll sends all that was picked.
func readAll(t *testing.T, m *model) {
	t.Helper()
	for len(m.batches) > 0 {
		must(t, m.read(0, ^uint64(0), undisturbed))
	}
}

// sendPages picks and sends the 64 pages of one word.
func sendPages(t *testing.T, m *model, from uint64) {
	t.Helper()
	pickFrom(t, m, from)
	readAll(t, m)
}

var (
	twoWords = setup{pages: []uint64{128}, manual: true, filled: true, shift: 7}
	oneWord  = setup{pages: []uint64{64}, manual: true, filled: true, shift: 6}
	// Every bit is set at first, so that a write to any page sets none.
	initiallySet = setup{pages: []uint64{64}, manual: true, initiallySet: true, filled: true, shift: 6}
)

var scenarios = []scenario{
	{readBeforeClear, oneWord, func(t *testing.T, m *model) {
		sendPages(t, m, 0)
		m.guestWrite(0, 5)
		must(t, m.sync())
		// The flaw reads here. The write below sets no bit: page 5 is dirty
		// already. Pick then clears that bit.
		m.src.Hooks.Window = func(int, uint64, uint64) { m.guestWrite(0, 5) }
		pickFrom(t, m, 0)
		m.src.Hooks.Window = nil
		readAll(t, m)
	}, 5},
	{holeBeforeClear, initiallySet, func(t *testing.T, m *model) {
		// Page 6 is a hole when the flaw looks, and populated while Pick clears.
		m.src.Hooks.Window = func(int, uint64, uint64) { m.guestWrite(0, 6) }
		pickFrom(t, m, 0)
		m.src.Hooks.Window = nil
		readAll(t, m)
	}, 6},
	{clearAllOnes, twoWords, func(t *testing.T, m *model) {
		sendPages(t, m, 0)
		sendPages(t, m, 64)
		m.guestWrite(0, 70) // fetched: it gives the chunk something to clear
		must(t, m.sync())
		m.guestWrite(0, 5) // not fetched, and cleared with page 70
		sendPages(t, m, 64)
	}, 5},
	{noWrittenSince, twoWords, func(t *testing.T, m *model) {
		must(t, m.announce())
		m.see()
		m.hint(0, 5, 1)
		m.guestWrite(0, 5) // taken back
		m.guestWrite(0, 70)
		must(t, m.sync())   // reports it
		sendPages(t, m, 64) // clears its bit, with that of page 70
		must(t, m.processHint(0, false))
	}, 5},
	{announceFirst, oneWord, func(t *testing.T, m *model) {
		must(t, m.announce())
		m.see()
		m.hint(0, 5, 1)
		m.guestWrite(0, 5) // taken back
		must(t, m.processHint(0, false))
	}, 5},
	{announceUnarmed, twoWords, func(t *testing.T, m *model) {
		m.guestWrite(0, 5)
		must(t, m.sync())
		must(t, m.announce())
		m.see()
		m.hint(0, 5, 1)
		m.guestWrite(0, 5) // taken back; its bit is set already
		m.guestWrite(0, 70)
		sendPages(t, m, 64) // clears the bit of page 5, which is in the same chunk
		must(t, m.processHint(0, false))
	}, 5},
	{anyID, oneWord, func(t *testing.T, m *model) {
		must(t, m.announce())
		m.see()
		m.hint(0, 5, 1)
		m.guestWrite(0, 5) // taken back
		must(t, m.sync())
		must(t, m.announce()) // arms it, and forgets that it was written
		must(t, m.processHint(0, false))
	}, 5},
	{clearAtHint, oneWord, func(t *testing.T, m *model) {
		m.guestWrite(0, 5)
		must(t, m.sync())
		must(t, m.announce())
		m.see()
		m.hint(0, 5, 1)
		m.guestWrite(0, 5) // taken back; its bit is set already
		must(t, m.processHint(0, false))
	}, 5},
	{hintFetched, twoWords, func(t *testing.T, m *model) {
		m.guestWrite(0, 5)
		must(t, m.sync())
		must(t, m.announce())
		m.see()
		m.hint(0, 5, 1)
		m.guestWrite(0, 5) // taken back; its bit is set already
		must(t, m.processHint(0, false))
		sendPages(t, m, 64) // clears the bit of page 5, which is in the same chunk
	}, 5},
	{syncOverwrites, oneWord, func(t *testing.T, m *model) {
		m.guestWrite(0, 5)
		must(t, m.sync())
		m.guestWrite(0, 6)
	}, 4},
	{takeAfterReading, twoWords, func(t *testing.T, m *model) {
		pickFrom(t, m, 0)
		must(t, m.read(0, 6, undisturbed)) // pages 0 to 5
		m.guestWrite(0, 5)
		must(t, m.sync())
		readAll(t, m)
		pickFrom(t, m, 64) // clears the chunk
		readAll(t, m)
	}, 5},
	{noLastSync, oneWord, func(t *testing.T, m *model) {
		sendPages(t, m, 0)
		m.guestWrite(0, 5)
	}, 5},
	{portAfterLastSync, oneWord, func(t *testing.T, m *model) {
		sendPages(t, m, 0)
	}, anyPage},
	{devicesNotDrained, oneWord, func(t *testing.T, m *model) {
		sendPages(t, m, 0)
		m.deviceWrite(0, 5)
	}, 5},
	{holesSkipped, oneWord, func(t *testing.T, m *model) {
		sendPages(t, m, 0)
		m.punch(0, 5, 1)
	}, 5},
	{punchUnmarked, oneWord, func(t *testing.T, m *model) {
		sendPages(t, m, 0)
		m.punch(0, 5, 1)
	}, 5},
	{zeroIgnored, oneWord, func(t *testing.T, m *model) {
		sendPages(t, m, 0)
		m.guestZero(0, 5)
	}, 5},
}

const anyPage = ^uint64(0)

// tell runs a scenario to its end and returns the lost pages.
func tell(t *testing.T, sc scenario, breakWith flaw) []simtest.Loss {
	t.Helper()
	s := sc.setup
	s.breakWith = breakWith
	m, err := newModel(s)
	must(t, err)
	defer m.close()
	sc.story(t, m)
	must(t, m.check(), m.finish())
	return m.losses()
}

// Each invariant that is broken on purpose loses the page of its scenario. If it holds, the
// same scenario loses nothing. So each is needed, and the model detects its absence.
func TestEveryFlawLosesAPage(t *testing.T) {
	told := map[flaw]bool{}
	for _, sc := range scenarios {
		told[sc.flaw] = true
		t.Run(string(sc.flaw), func(t *testing.T) {
			for _, l := range tell(t, sc, none) {
				t.Errorf("lost without the flaw: %v", l)
			}
			losses := tell(t, sc, sc.flaw)
			for _, l := range losses {
				if sc.lost == anyPage || l.Page == sc.lost {
					t.Log(l)
					return
				}
			}
			t.Errorf("page %d is not among the pages lost: %v", sc.lost, losses)
		})
	}
	for _, f := range flaws {
		if !told[f] {
			t.Errorf("no story for %q", f)
		}
	}
}
