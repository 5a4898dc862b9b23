package migrate_test

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/govmm/govmm/migrate"
)

// block is what Linux hints at once: 4 MiB (VIRTIO_BALLOON_HINT_BLOCK_ORDER in
// drivers/virtio/virtio_balloon.c, the largest order of its page allocator).
const block = 1024

// guestMemory is a guest of 4 GiB in slots of 1 GiB, of which half is free: single blocks,
// or runs of blocks.
type guestMemory struct {
	name string
	free []bool // of each block
}

const survivalSlots, survivalSlotPages = 4, 1 << 18

func newGuestMemory(name string, run int) guestMemory {
	g := guestMemory{name, make([]bool, survivalSlots*survivalSlotPages/block)}
	r := rand.New(rand.NewPCG(1, uint64(run)))
	isFree := false
	for i := range g.free {
		if r.IntN(run) == 0 { // a new run, of either kind
			isFree = r.IntN(2) == 0
		}
		g.free[i] = isFree
	}
	return g
}

// survival is the effect of the hints of one migration.
type survival struct {
	taken    uint64 // pages that hints took out, and that were not written again
	survived uint64 // of those: still out after the next sync
	lost     int    // pages taken back and written, whose write did not arrive
}

// survives plays the first round of a migration: the log is on and initially set, the id
// is announced, a quarter of the memory has been sent when the hints are processed, the
// rest is sent, the log is synced. One in a hundred free pages was taken back and rewritten
// after its hint was queued. Then the guest stops, and the rest is sent.
func (g guestMemory) survives(t *testing.T, p policy, shift uint) survival {
	t.Helper()
	pages := make([]uint64, survivalSlots)
	for i := range pages {
		pages[i] = survivalSlotPages
	}
	log := newSchedLog(true, true, pages...)
	tracker, err := migrate.NewTracker(log.layout(), log, shift)
	must(t, err)
	must(t, tracker.Start(), p.begin(tracker, 1))

	const all = survivalSlots * survivalSlotPages
	// Every hundredth page is one that the guest takes back, if it is free.
	const every = 100
	written, arrived := make([]bool, all/every+1), make([]bool, all/every+1)
	picked := make([]uint64, 8)
	send := func(first, end uint64) {
		for first < end {
			slot, page := first/survivalSlotPages, first%survivalSlotPages
			at, n, err := tracker.Pick(int(slot), page, 512, picked)
			must(t, err)
			base := slot*survivalSlotPages + at
			for page := (base + every - 1) / every * every; page < base+n; page += every {
				if i := page - base; picked[i/64]>>(i%64)&1 != 0 {
					arrived[page/every] = written[page/every]
				}
			}
			first = base + n
		}
	}
	toSend := func() (words []uint64) {
		for slot := range pages {
			words = append(words, tracker.ToSend(slot)...)
		}
		return words
	}
	send(0, all/4)

	// The guest has queued its hints, and takes some pages back.
	isFree := func(page uint64) bool { return g.free[page/block] }
	unwritten := make([]uint64, all/64)
	for i := range unwritten {
		unwritten[i] = ^uint64(0)
	}
	for page := uint64(0); page < all; page += every {
		if isFree(page) {
			written[page/every] = true
			unwritten[page/64] &^= 1 << (page % 64)
			log.guestWrite(int(page/survivalSlotPages), page%survivalSlotPages)
		}
	}
	before := toSend()
	for page := uint64(0); page < all; page += block {
		if isFree(page) {
			must(t, p.apply(tracker, 1, place{int(page / survivalSlotPages), page % survivalSlotPages}, block))
		}
	}
	after := toSend()
	send(all/4, all)
	must(t, tracker.Sync())
	var s survival
	for i, synced := range toSend() {
		out := before[i] &^ after[i] & unwritten[i]
		s.taken += uint64(bits.OnesCount64(out))
		s.survived += uint64(bits.OnesCount64(out &^ synced))
	}
	send(0, all)
	for i, w := range written {
		if w && !arrived[i] {
			s.lost++
		}
	}
	return s
}

// survivalTable is the table of docs/hints.md.
const survivalTable = `free memory in single blocks of 4 MiB
shift  chunk in MiB                  never clear            clear at the hint                        epoch
    6          0.25     0.0%,     0 writes lost   100.0%,  3767 writes lost   100.0%,     0 writes lost
    9             2     0.0%,     0 writes lost   100.0%,  3767 writes lost   100.0%,     0 writes lost
   12            16    93.5%,  3522 writes lost   100.0%,  3767 writes lost   100.0%,     0 writes lost
   15           128   100.0%,  3767 writes lost   100.0%,  3767 writes lost   100.0%,     0 writes lost
   18          1024   100.0%,  3767 writes lost   100.0%,  3767 writes lost   100.0%,     0 writes lost
free memory in runs, 128 MiB on average
shift  chunk in MiB                  never clear            clear at the hint                        epoch
    6          0.25     0.0%,     0 writes lost   100.0%,  3768 writes lost   100.0%,     0 writes lost
    9             2     0.0%,     0 writes lost   100.0%,  3768 writes lost   100.0%,     0 writes lost
   12            16     6.5%,   245 writes lost   100.0%,  3768 writes lost   100.0%,     0 writes lost
   15           128    56.5%,  2129 writes lost   100.0%,  3768 writes lost   100.0%,     0 writes lost
   18          1024   100.0%,  3768 writes lost   100.0%,  3768 writes lost   100.0%,     0 writes lost
`

// How many of the pages that hints took out, and that nobody wrote, the next sync leaves
// out, and how many writes each policy loses.
func TestHintsThatSurviveTheNextSync(t *testing.T) {
	policies := []policy{policyNeverClear, policyClearAtHint, policyEpoch}
	var b strings.Builder
	for _, g := range []guestMemory{newGuestMemory("single blocks of 4 MiB", 1), newGuestMemory("runs, 128 MiB on average", 16)} {
		fmt.Fprintf(&b, "free memory in %s\nshift  chunk in MiB", g.name)
		for _, p := range policies {
			fmt.Fprintf(&b, "  %27s", p.name)
		}
		b.WriteByte('\n')
		for _, shift := range []uint{6, 9, 12, 15, 18} {
			fmt.Fprintf(&b, "%5d  %12g", shift, float64(uint64(4)<<shift)/1024)
			for _, p := range policies {
				s := g.survives(t, p, shift)
				fmt.Fprintf(&b, "  %6.1f%%, %5d writes lost", 100*float64(s.survived)/float64(s.taken), s.lost)
				if p.name == policyEpoch.name && (s.lost != 0 || s.survived != s.taken || s.taken == 0) {
					t.Errorf("hint epochs: %+v", s)
				}
			}
			b.WriteByte('\n')
		}
	}
	t.Logf("\n%s", b.String())
	if b.String() != survivalTable {
		t.Error("this is not the table that is kept here, and shown in docs/hints.md")
	}
}
