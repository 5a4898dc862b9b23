package migrate_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/govmm/govmm/migrate"
)

// policy is a way to treat free-page hints. The engine has one, [policyEpoch]; the others
// are wrong, and tests show how they fail.
type policy struct {
	name string
	// begin comes before an id is announced, apply is one hint: of n pages.
	begin func(t *migrate.Tracker, id uint32) error
	apply func(t *migrate.Tracker, id uint32, p place, n uint64) error
	// announceFirst announces an id before begin.
	announceFirst bool
	// clearsAtHint: apply calls CLEAR, which waits for one that is under way.
	clearsAtHint bool
	// noDance begins a new epoch at any time, and does not wait for the
	// driver's STOP under the id before.
	noDance bool
}

var (
	// policyEpoch is the engine's: the tracker's own methods.
	policyEpoch = policy{name: "epoch", begin: (*migrate.Tracker).BeginHintEpoch, apply: hint}

	// policyNeverClear is QEMU's before July 2021: a hint takes the page out of toSend,
	// and its bit stays in KVM's log.
	policyNeverClear = policy{name: "never clear", begin: syncOnly, apply: hintAll(false)}

	// policyClearAtHint is QEMU's since then: the chunk is cleared when the hint is
	// processed.
	policyClearAtHint = policy{name: "clear at the hint", begin: syncOnly, apply: hintAll(true), clearsAtHint: true}

	// policyForgetful is the epoch without writtenSince.
	policyForgetful = policy{name: "epoch without writtenSince", begin: (*migrate.Tracker).BeginHintEpoch,
		apply: func(t *migrate.Tracker, id uint32, p place, n uint64) error {
			t.ForgetWritten()
			return hint(t, id, p, n)
		}}

	// R3 without one part of it each.
	policyImpatient = policy{name: "epoch, new id without the driver's STOP", begin: policyEpoch.begin, apply: hint, noDance: true}
	policyHasty     = policy{name: "epoch, announced before it is armed", begin: policyEpoch.begin, apply: hint, announceFirst: true}
	policyAnyID     = policy{name: "epoch, the id of a hint not checked", begin: policyEpoch.begin,
		apply: func(t *migrate.Tracker, _ uint32, p place, n uint64) error { return hint(t, t.HintEpoch(), p, n) }}
)

func hint(t *migrate.Tracker, id uint32, p place, n uint64) error {
	t.Hint(id, p.slot, p.page, n)
	return nil
}

func hintAll(clearing bool) func(*migrate.Tracker, uint32, place, uint64) error {
	return func(t *migrate.Tracker, id uint32, p place, n uint64) error {
		return t.HintAll(id, p.slot, p.page, n, clearing)
	}
}

// syncOnly begins an epoch like QEMU, which asks for hints after a sync.
func syncOnly(t *migrate.Tracker, id uint32) error {
	if err := t.Sync(); err != nil {
		return err
	}
	t.BeginHintEpochUnarmed(id)
	return nil
}

// coverage counts what schedules did, to check that a search that finds nothing has tried
// what it should.
type coverage struct {
	epochs      int // ids announced
	took        int // hints that took a page out
	leftWritten int // hints that left a page, written since the announcement
	underWay    int // hints of a page that was being sent
	late        int // hints that reached the tracker after their id had ended
	dropped     int // hints that the hint thread dropped
	takenBack   int // hinted pages that were written again
	inCalls     int // moves while a call of the tracker ran
	inClears    int // moves of another thread of the host while a CLEAR ran
	spared      int // pages that hints kept off the wire for good
}

func (c coverage) String() string {
	return fmt.Sprintf("%d ids announced; hints: %d took a page out, %d left one that was written since, %d of one on its way, %d late, %d dropped; "+
		"%d hinted pages written again; %d moves during the tracker's calls, %d of other threads during a CLEAR; %d pages never sent",
		c.epochs, c.took, c.leftWritten, c.underWay, c.late, c.dropped, c.takenBack, c.inCalls, c.inClears, c.spared)
}

// names are pages in words, those that take part.
func (w *world) names(slot int, first uint64, b []uint64) string {
	hot := w.hotIn(slot, first, b)
	if len(hot) == 0 {
		return "none of these pages"
	}
	names := make([]string, len(hot))
	for i, p := range hot {
		names[i] = w.hot[p].String()
	}
	return strings.Join(names, ", ")
}

// tellSchedule plays a schedule and returns it as text, one line a step.
func tellSchedule(l layout, p policy, s schedule) (string, outcome, error) {
	w := newWorld(l, p)
	var b strings.Builder
	fmt.Fprintf(&b, "%s; %v\n", p.name, l)
	lines := 0
	w.print = func(who, what string) {
		if who == "" {
			fmt.Fprintf(&b, "    %-10s  %s\n", "", what)
			return
		}
		lines++
		fmt.Fprintf(&b, "%3d %-10s  %s\n", lines, who, what)
	}
	started := false
	w.log.did = func(what string, slot int, first uint64, bits []uint64) {
		if started && len(w.hotIn(slot, first, bits)) > 0 {
			w.say("kvm", "%s: %s", what, w.names(slot, first, bits))
		}
	}
	src := &play{rest: s}
	got, err := w.run(startWatch{src, &started})
	return b.String(), got, err
}

// startWatch notices when the schedule proper begins.
type startWatch struct {
	source
	begun *bool
}

func (s startWatch) peek(w *world) (move, bool) {
	*s.begun = true
	return s.source.peek(w)
}

func (c *coverage) add(d coverage) {
	c.epochs += d.epochs
	c.took += d.took
	c.leftWritten += d.leftWritten
	c.underWay += d.underWay
	c.late += d.late
	c.dropped += d.dropped
	c.takenBack += d.takenBack
	c.inCalls += d.inCalls
	c.inClears += d.inClears
	c.spared += d.spared
}

// check checks that every counter is positive.
func (c coverage) check(t *testing.T) {
	t.Helper()
	for what, n := range map[string]int{
		"id announced": c.epochs, "hint that took a page out": c.took, "hint that left a page": c.leftWritten,
		"hint of a page on its way": c.underWay, "late hint": c.late, "dropped hint": c.dropped, "hinted page written again": c.takenBack,
		"move during a call of the tracker": c.inCalls, "hint or fetch during a CLEAR": c.inClears, "page never sent": c.spared,
	} {
		if n == 0 {
			t.Errorf("the search met no %s", what)
		}
	}
}
