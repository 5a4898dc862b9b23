package migrate_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var (
	schedSteps = flag.Uint64("sched.steps", 400_000, "steps of the scheduler in which hint epochs must lose nothing, half of them from a fixed seed")
	schedSeed  = flag.Uint64("sched.seed", 0, "seed of the other half (0 to draw one)")
)

// chooser draws the moves of one schedule from those that can be made, and records them.
type chooser struct {
	random rand.PCG
	acts   []act   // an act is in it as often as it is likely
	pages  []uint8 // likewise
	left   int     // moves still to come, without those that only continue a call
	steps  int     // made
	next   move
	have   bool
	made_  schedule
}

// reset begins the schedule of a seed. Each schedule lacks some of the acts and pages, and
// has some more often: an error that needs no sync in between is found by a schedule
// without any.
func (c *chooser) reset(seed uint64, places int) {
	c.random.Seed(seed, 1)
	c.acts, c.pages, c.made_, c.have = c.acts[:0], c.pages[:0], c.made_[:0], false
	for do := range act(acts) {
		if do == goesOn || do == stopsGuest || do == syncsLast || do == undoesStop {
			continue
		}
		often := [8]int{0, 0, 0, 0, 1, 1, 2, 3}
		switch do { // without these there are no hints; mostly they can't be made
		case announces, guestSees, guestHints, hintsTake, hintsApply:
			often = [8]int{1, 2, 3, 5, 8, 12, 16, 20}
		case beginsEpoch, guestWrites, guestFrees:
			often = [8]int{1, 1, 1, 2, 2, 3, 4, 6}
		}
		for range often[c.draw(8)] {
			c.acts = append(c.acts, do)
		}
	}
	for range [4]int{1, 1, 2, 3}[c.draw(4)] {
		c.pages = append(c.pages, uint8(c.draw(uint64(places))))
	}
	c.steps, c.left = 0, 20+int(c.draw(80))
}

func (c *chooser) draw(n uint64) uint64 { return c.random.Uint64() % n }

// peek implements source.
func (c *chooser) peek(w *world) (move, bool) {
	if c.have {
		return c.next, true
	}
	if c.left <= 0 {
		return move{}, false
	}
	if w.inCall && c.draw(2) == 0 {
		return c.choose(move{do: goesOn})
	}
	if c.left < 15 && !w.inCall && c.draw(8) == 0 {
		for _, do := range []act{stopsGuest, syncsLast, undoesStop} {
			if m := (move{do: do}); w.can(m) && (do != undoesStop || w.last) {
				return c.choose(m)
			}
		}
	}
	for range 30 {
		m := move{c.acts[c.draw(uint64(len(c.acts)))], c.pages[c.draw(uint64(len(c.pages)))]}
		if (m.do == guestWrites || m.do == deviceWrites) && w.use[m.page] == free && c.draw(4) != 0 {
			continue // otherwise nothing stays free for long enough to be hinted
		}
		if w.can(m) {
			if !m.do.ofPage() {
				m.page = 0
			}
			return c.choose(m)
		}
	}
	if w.inCall {
		return c.choose(move{do: goesOn})
	}
	return move{}, false // no act of this schedule is possible
}

func (c *chooser) choose(m move) (move, bool) {
	c.next, c.have = m, true
	return m, true
}

func (c *chooser) made() {
	c.made_ = append(c.made_, c.next)
	c.have = false
	if c.next.do != goesOn {
		c.left--
		c.steps++
	}
}

// found is a schedule with an error.
type found struct {
	layout   layout
	policy   policy
	schedule schedule
	outcome  outcome
	seed     uint64
	steps    uint64 // until it was found
}

// search plays schedules of a policy, from seeds that count up from seed, until bad returns
// true for one or steps have been made.
func search(p policy, seed, steps uint64, bad func(outcome) bool) (f *found, made uint64, seen coverage, err error) {
	worlds := make([]*world, len(layouts))
	for i, l := range layouts {
		worlds[i] = newWorld(l, p)
	}
	var c chooser
	for ; made < steps; seed++ {
		w := worlds[seed%uint64(len(worlds))]
		c.reset(seed, len(w.hot))
		got, err := w.run(&c)
		made += uint64(c.steps)
		if err != nil {
			return nil, made, seen, fmt.Errorf("seed %d: %w", seed, err)
		}
		if bad(got) {
			return &found{w.layout, p, slices.Clone(c.made_), got, seed, made}, made, seen, nil
		}
	}
	for _, w := range worlds {
		seen.add(w.seenBy)
	}
	return nil, made, seen, nil
}

// shrink removes moves from a schedule, and makes pages smaller, while the error stays.
func (f *found) shrink(bad func(outcome) bool) {
	w := newWorld(f.layout, f.policy)
	still := func(s schedule) bool {
		got, err := w.run(&play{rest: s})
		return err == nil && bad(got)
	}
	for again := true; again; {
		again = false
		for size := len(f.schedule); size > 0; size /= 2 {
			for at := 0; at+size <= len(f.schedule); {
				if s := slices.Delete(slices.Clone(f.schedule), at, at+size); still(s) {
					f.schedule, again = s, true
				} else {
					at++
				}
			}
		}
		for i, m := range f.schedule {
			for page := range m.page {
				s := slices.Clone(f.schedule)
				s[i].page = page
				if still(s) {
					f.schedule, again = s, true
					break
				}
			}
		}
	}
}

func (f *found) String() string {
	told, _, err := tellSchedule(f.layout, f.policy, f.schedule)
	if err != nil {
		told += err.Error()
	}
	l := f.layout
	return fmt.Sprintf("%sto keep it: layout{pages: %#v, shift: %d, manual: %v, initiallySet: %v, batch: %d}, schedule{\n%v\n}",
		told, l.pages, l.shift, l.manual, l.initiallySet, l.batch, f.schedule)
}

// What a search may look for.
func ruined(o outcome) bool { return len(o.ruined) > 0 }
func undone(o outcome) bool { return len(o.undone) > 0 }

// drawSeed is a random seed, which is printed.
func drawSeed(t *testing.T) uint64 {
	seed := *schedSeed
	if seed == 0 {
		seed = 1 + rand.Uint64N(1<<48)
	}
	t.Logf("drawn: -sched.seed=%d", seed)
	return seed
}

// The search finds the error of every policy except the engine's; for those that are in
// use, with any seed.
func TestSearchFindsWhatIsWrongWithHints(t *testing.T) {
	random := drawSeed(t)
	for _, c := range []struct {
		policy policy
		bad    func(outcome) bool
		what   string
		seeds  []uint64
	}{
		{policyNeverClear, undone, "a hint undone by the next sync", []uint64{1, random}},
		{policyNeverClear, ruined, "a lost write", []uint64{1, random}},
		{policyClearAtHint, ruined, "a lost write", []uint64{1, random}},
		{policyForgetful, ruined, "a lost write", []uint64{1, random}},
		// About one step in a million finds it; this seed finds it early.
		{policyImpatient, ruined, "a lost write", []uint64{224_786}},
		{policyHasty, ruined, "a lost write", []uint64{1}},
		{policyAnyID, ruined, "a lost write", []uint64{1}},
	} {
		t.Run(c.policy.name+": "+c.what, func(t *testing.T) {
			for _, seed := range c.seeds {
				f, made, _, err := search(c.policy, seed, 10_000_000, c.bad)
				if err != nil {
					t.Fatal(err)
				}
				if f == nil {
					t.Fatalf("seed %d: not found in %d steps: %s", seed, made, c.what)
				}
				f.shrink(c.bad)
				t.Logf("found after %d steps (seed %d), shrunk to %d moves:\n%v", f.steps, f.seed, len(f.schedule), f)
			}
		})
	}
}

// With the engine's hints there is no error, in -sched.steps steps.
func TestHintEpochsLoseNothing(t *testing.T) {
	for _, seed := range []uint64{1, drawSeed(t)} {
		began := time.Now()
		f, made, seen, err := search(policyEpoch, seed, *schedSteps/2, outcome.any)
		if err != nil {
			t.Fatal(err)
		}
		if f != nil {
			f.shrink(outcome.any)
			t.Fatalf("seed %d, found after %d steps:\n%v", f.seed, f.steps, f)
		}
		t.Logf("seed %d: nothing in %d steps, %.0f a second; %v", seed, made, float64(made)/time.Since(began).Seconds(), seen)
		seen.check(t)
	}
}
