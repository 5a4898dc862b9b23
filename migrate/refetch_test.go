package migrate_test

import (
	"math/rand/v2"
	"testing"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/simtest"
)

// The pages that a migration sends if the log of each slot is fetched again before it is
// sent, and with one sync a round: the tracker over the simulated log. Time is counted in
// pages sent.

type refetchWork struct {
	name string
	// write makes one write of the guest; per is how many it makes while a page is sent.
	write func(m *simtest.Memory, r *rand.Rand, n int)
	per   float64
}

const refetchSlots, refetchPages = 8, 512

// at writes a page, counted over all slots.
func at(m *simtest.Memory, page int) {
	m.GuestWrite(page/refetchPages%refetchSlots, uint64(page%refetchPages))
}

// play sends until so few pages are left that the guest can be stopped, and then those. If
// again, slots are fetched again.
func (w refetchWork) play(t *testing.T, again bool) (sent uint64, rounds int) {
	t.Helper()
	var l simtest.Layout
	for i := range refetchSlots {
		l.Slots = append(l.Slots, migrate.Slot{GPA: uint64(i) << 30, Pages: refetchPages})
	}
	l.ManualProtect, l.InitiallySet = true, true
	m, err := simtest.NewMemory(l)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	tr, err := migrate.NewTracker(l.Slots, m, 18)
	if err != nil {
		t.Fatal(err)
	}
	if err := tr.Start(); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	writes, done := 0.0, 0
	picked := make([]uint64, 1)
	for {
		rounds++
		for slot := range refetchSlots {
			if again {
				if _, err := tr.SyncSlot(slot); err != nil {
					t.Fatal(err)
				}
			}
			for from := uint64(0); ; {
				first, n, err := tr.Pick(slot, from, 64, picked)
				if err != nil {
					t.Fatal(err)
				}
				if n == 0 {
					break
				}
				from = first + n
				for ; picked[0] != 0; picked[0] &= picked[0] - 1 {
					sent++
					for writes += w.per; writes >= 1; writes-- {
						w.write(m, r, done)
						done++
					}
				}
			}
		}
		if err := tr.Sync(); err != nil {
			t.Fatal(err)
		}
		if left := tr.Remaining(); left <= 64 || rounds == 100 {
			return sent + left, rounds
		}
	}
}

// With the log fetched again before each slot, guests that write slower than the link need
// fewer rounds, never more, and as many pages: a page that waits to be sent and is written
// again is sent once either way, since picking it clears both writes.
func TestRefetch(t *testing.T) {
	const all = refetchSlots * refetchPages
	fewer := 0
	for _, per := range []float64{0.1, 0.25, 0.5, 0.8} {
		for _, w := range []refetchWork{
			{"one slot, at random", func(m *simtest.Memory, r *rand.Rand, _ int) { at(m, r.IntN(refetchPages)) }, per},
			{"an eighth of each slot, at random", func(m *simtest.Memory, r *rand.Rand, _ int) {
				m.GuestWrite(r.IntN(refetchSlots), uint64(r.IntN(refetchPages/8)))
			}, per},
			{"all memory, at random", func(m *simtest.Memory, r *rand.Rand, _ int) { at(m, r.IntN(all)) }, per},
			{"all memory, in order", func(m *simtest.Memory, _ *rand.Rand, n int) { at(m, n) }, per},
			{"one half, in order", func(m *simtest.Memory, _ *rand.Rand, n int) { at(m, n%(all/2)) }, per},
			{"all memory, backwards", func(m *simtest.Memory, _ *rand.Rand, n int) { at(m, all-1-n%all) }, per},
		} {
			sent, rounds := w.play(t, true)
			once, onceRounds := w.play(t, false)
			t.Logf("%4.2f writes a page, %-33s %5d pages in %2d rounds; once a round %5d in %2d", per, w.name+":", sent, rounds, once, onceRounds)
			if rounds > onceRounds || sent > once*103/100 || once > sent*103/100 {
				t.Errorf("%s: %d pages in %d rounds, %d in %d", w.name, sent, rounds, once, onceRounds)
			}
			fewer += onceRounds - rounds
		}
	}
	if fewer == 0 {
		t.Error("no guest was done in fewer rounds")
	}
}
