package vmm

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"pgregory.net/rapid"
)

// hintSlots are those of a guest of 4.5 GiB: the hole is between the third and
// the fourth.
var hintSlots = []migrate.Slot{
	{GPA: 0, Pages: 1 << 18}, {GPA: 1 << 30, Pages: 1 << 18}, {GPA: 2 << 30, Pages: 1 << 18},
	{GPA: 4 << 30, Pages: 1 << 18}, {GPA: 5 << 30, Pages: 1 << 17},
}

func TestHintsAreCutAtSlots(t *testing.T) {
	const gib = 1 << 30
	for name, c := range map[string]struct {
		r    mempage.Range
		want []migrate.PageRange
	}{
		"one page":          {mempage.Range{GPA: 0x5000, Bytes: 0x1000}, []migrate.PageRange{{Slot: 0, First: 5, N: 1}}},
		"a border":          {mempage.Range{GPA: gib - 0x1000, Bytes: 0x3000}, []migrate.PageRange{{Slot: 0, First: 1<<18 - 1, N: 1}, {Slot: 1, First: 0, N: 2}}},
		"three slots":       {mempage.Range{GPA: 0x1000, Bytes: 3*gib - 0x1000}, []migrate.PageRange{{Slot: 0, First: 1, N: 1<<18 - 1}, {Slot: 1, First: 0, N: 1 << 18}, {Slot: 2, First: 0, N: 1 << 18}}},
		"across the hole":   {mempage.Range{GPA: 3*gib - 0x1000, Bytes: gib + 0x2000}, []migrate.PageRange{{Slot: 2, First: 1<<18 - 1, N: 1}, {Slot: 3, First: 0, N: 1}}},
		"in the hole":       {mempage.Range{GPA: 3 * gib, Bytes: gib}, nil},
		"beyond the end":    {mempage.Range{GPA: 5*gib + 1<<29 - 0x1000, Bytes: gib}, []migrate.PageRange{{Slot: 4, First: 1<<17 - 1, N: 1}}},
		"behind everything": {mempage.Range{GPA: 1 << 40, Bytes: gib}, nil},
		"wraps around":      {mempage.Range{GPA: ^uint64(0) - 0xfff, Bytes: 0x2000}, nil},
		"no whole page":     {mempage.Range{GPA: 0x1001, Bytes: 0x1ffe}, nil},
		"nothing":           {mempage.Range{GPA: gib}, nil},
	} {
		if got := appendPages(nil, hintSlots, c.r); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// Whatever the range, each of its whole pages that is RAM comes once, and no
// other.
func TestHintsAreCutAtSlotsWhateverTheyAre(t *testing.T) {
	slots := []migrate.Slot{{GPA: 0, Pages: 5}, {GPA: 0x5000, Pages: 3}, {GPA: 0xa000, Pages: 4}}
	rapid.Check(t, func(t *rapid.T) {
		r := mempage.Range{GPA: rapid.Uint64Range(0, 0x12000).Draw(t, "gpa"), Bytes: rapid.Uint64Range(0, 0x12000).Draw(t, "bytes")}
		seen := map[uint64]bool{}
		for _, p := range appendPages(nil, slots, r) {
			for i := p.First; i < p.First+p.N; i++ {
				gpa := slots[p.Slot].GPA + i*mempage.Size
				if i >= slots[p.Slot].Pages || seen[gpa] || gpa < r.GPA || gpa+mempage.Size > r.GPA+r.Bytes {
					t.Fatalf("page %d of slot %d", i, p.Slot)
				}
				seen[gpa] = true
			}
		}
		want := 0
		for _, s := range slots {
			for gpa := s.GPA; gpa < s.GPA+s.Pages*mempage.Size; gpa += mempage.Size {
				if gpa >= r.GPA && gpa+mempage.Size <= r.GPA+r.Bytes {
					want++
				}
			}
		}
		if len(seen) != want {
			t.Fatalf("%d pages, want %d", len(seen), want)
		}
	})
}

func TestNoBalloonNoHints(t *testing.T) {
	if s := newHintSource(nil, hintSlots); s != nil {
		t.Errorf("hints from %v", s)
	}
}

// hintsOf starts the demo guest with a pool, which it hints, and waits until
// the pool is ready.
func hintsOf(t *testing.T, cmdline string) *ran {
	t.Helper()
	needKVM(t)
	con := newTape()
	vm, err := NewVM(Config{CPUs: 1, Memory: 96 << 20, Serial: con, Logf: t.Logf, Cmdline: cmdline, Devices: Devices{Balloon: true}})
	check(t, err)
	r := run(t, vm, con)
	con.awaitPart(t, "is ready in")
	return r
}

// moveHinted moves a guest and returns what that came to.
func (r *ran) moveHinted(t *testing.T, opt migrate.Options) (*ran, migrate.Result) {
	t.Helper()
	next := receiving(t, ReceiveConfig{})
	m, err := r.StartMigration(next.Addr().String(), opt)
	check(t, err)
	res := result(t, m)
	if res.Status != "completed" {
		t.Fatalf("%+v", res)
	}
	r.ends(t, Migrated, "")
	return next, res
}

// TestDemoGuestHints moves the demo guest on and on: what it hints stays off
// the wire, though it takes half of that back at once and rewrites it, and
// nothing that it has is lost. Each id is another one, on whatever host, since
// the driver ignores the one that it had.
func TestDemoGuestHints(t *testing.T) {
	r := hintsOf(t, "fill=8M dirty=1M rate=50 verify=1 tick=1 pool=64M hintrace reports=0")
	answered := 0
	for n := 0; answered < 3; n++ {
		if n == 10 {
			t.Fatalf("of %d migrations hints counted in %d", n, answered)
		}
		next, res := r.moveHinted(t, migrate.Options{Hints: migrate.HintsOn, HintWait: migrate.MaxHintWait})
		if res.PagesHinted > 0 {
			answered++
		} else {
			// A machine that is busy with other things does not let the guest
			// answer in time; then the migration goes on without.
			t.Logf("migration %d: %+v", n, res)
		}
		if res.HintsReceived >= 4<<20/mempage.Size && answered == 1 && res.HintsRewritten == 0 {
			t.Errorf("nothing of what was taken back was rewritten: %+v", res)
		}
		r = next
		r.con.awaitPart(t, "tick")
		r.con.awaitPart(t, " bad=0 ")
	}
	if strings.Contains(r.con.text(), "bad page") {
		t.Error(r.con.text())
	}
	r.con.keys("poweroff\n")
	r.ends(t, PoweredOff, "")
}

// TestHintsOfAGuestThatReboots: the migration ends with the machine, and the
// next one, of the machine after it, gets hints again.
func TestHintsOfAGuestThatReboots(t *testing.T) {
	r := hintsOf(t, "fill=8M dirty=1M rate=50 verify=1 tick=1 pool=64M reports=0")
	next := receiving(t, ReceiveConfig{})
	m, err := r.StartMigration(next.Addr().String(), migrate.Options{Hints: migrate.HintsOn, BandwidthLimit: migrate.MinBandwidthLimit})
	check(t, err)
	for deadline := within(t); m.Progress().Phase != migrate.PhasePrecopy; time.Sleep(time.Millisecond) {
		check(t, deadline.Err())
	}
	r.con.keys("reboot\n")
	if res := result(t, m); res.Status == "completed" {
		t.Fatalf("%+v", res)
	}
	r.con.awaitThat(t, "a second pool", func(out string) bool { return strings.Count(out, "is ready in") == 2 })
	r, res := r.moveHinted(t, migrate.Options{Hints: migrate.HintsOn, HintWait: migrate.MaxHintWait})
	if res.PagesHinted == 0 {
		t.Errorf("after the reboot: %+v", res)
	}
	r.con.awaitPart(t, " bad=0 ")
	r.con.keys("poweroff\n")
	r.ends(t, PoweredOff, "")
}
