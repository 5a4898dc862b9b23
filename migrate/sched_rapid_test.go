package migrate_test

import (
	"flag"
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// genMoves draws schedules for rapid. Each has only some of the acts, always including
// those without which nothing is hinted.
var genMoves = rapid.Custom(func(t *rapid.T) schedule {
	with := []act{beginsEpoch, announces, guestSees, guestHints, guestHints, hintsTake, hintsTake, hintsApply}
	others := rapid.SliceOfN(rapid.SampledFrom([]act{guestWrites, guestWrites, guestTakes, guestFrees, guestEnds, deviceWrites,
		deviceMarks, syncs, refetches, picks, reads, sends, endsHints, stopsGuest, syncsLast, goesOn}), 0, 8).Draw(t, "others")
	with = append(with, others...)
	pages := rapid.SampledFrom([]uint8{0, 0, 0, 1, 2, 3})
	step := rapid.Custom(func(t *rapid.T) move {
		m := move{do: rapid.SampledFrom(with).Draw(t, "act")}
		if m.do.ofPage() {
			m.page = pages.Draw(t, "page")
		}
		return m
	})
	return rapid.OneOf(rapid.SliceOfN(step, 0, 14), rapid.SliceOfN(step, 15, 60)).Draw(t, "moves")
})

// players plays schedules of one policy in any layout.
type players struct {
	policy policy
	worlds []*world
}

func newPlayers(p policy) *players {
	all := &players{policy: p}
	for _, l := range layouts {
		all.worlds = append(all.worlds, newWorld(l, p))
	}
	return all
}

// play draws a schedule and plays it.
func (ps *players) play(t *rapid.T) found {
	w := ps.worlds[rapid.IntRange(0, len(ps.worlds)-1).Draw(t, "layout")]
	f := found{layout: w.layout, policy: ps.policy, schedule: genMoves.Draw(t, "schedule")}
	var err error
	if f.outcome, err = w.run(&play{rest: f.schedule}); err != nil {
		t.Fatal(err)
	}
	return f
}

// Hint epochs lose nothing in any schedule of rapid.
func TestRapidFindsNothingWrongWithHintEpochs(t *testing.T) {
	ps := newPlayers(policyEpoch)
	for n := range 10 { // a check takes microseconds: make more than rapid's hundred
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				if f := ps.play(t); f.outcome.any() {
					t.Fatalf("found:\n%v", &f)
				}
			})
		})
	}
}

// rapid finds and shrinks an error of the three policies that are known to be wrong.
func TestRapidFindsWhatIsWrongWithHints(t *testing.T) {
	setFlag(t, "rapid.checks", "3000000")
	setFlag(t, "rapid.nofailfile", "true")
	setFlag(t, "rapid.shrinktime", "2s")
	if flag.Lookup("rapid.seed").Value.String() == "0" {
		setFlag(t, "rapid.seed", "3") // how soon it is found depends on the seed
	}
	for _, c := range []struct {
		policy policy
		bad    func(outcome) bool
		what   string
	}{
		{policyNeverClear, undone, "a hint undone by the next sync"},
		{policyClearAtHint, ruined, "a lost write"},
		{policyForgetful, ruined, "a lost write"},
	} {
		t.Run(c.policy.name+": "+c.what, func(t *testing.T) {
			ps := newPlayers(c.policy)
			var last *found // rapid's last run is of the smallest
			checks, first := 0, 0
			rapid.Check(expectFailure{t}, func(t *rapid.T) {
				checks++
				if f := ps.play(t); c.bad(f.outcome) {
					last = &f
					if first == 0 {
						first = checks
					}
					t.Fatal(c.what)
				}
			})
			if last == nil {
				t.Fatalf("rapid found no %s", c.what)
			}
			byRapid := len(last.schedule)
			last.shrink(c.bad)
			t.Logf("found by check %d, shrunk by rapid to %d moves, then to %d:\n%v", first, byRapid, len(last.schedule), last)
		})
	}
}

// setFlag sets a flag of the test binary for one test.
func setFlag(t *testing.T, name, value string) {
	t.Helper()
	f := flag.Lookup(name)
	before := f.Value.String()
	must(t, f.Value.Set(value))
	t.Cleanup(func() { must(t, f.Value.Set(before)) })
}

// expectFailure is a rapid.TB that may fail without failing the test.
type expectFailure struct{ *testing.T }

func (expectFailure) Log(...any)            {}
func (expectFailure) Logf(string, ...any)   {}
func (expectFailure) Error(...any)          {}
func (expectFailure) Errorf(string, ...any) {}
func (expectFailure) Fatal(...any)          {}
func (expectFailure) Fatalf(string, ...any) {}
func (expectFailure) Fail()                 {}
func (expectFailure) FailNow()              {}
func (expectFailure) Failed() bool          { return false }
