package test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/test/kernel"
)

// linuxHints is a guest with one small process and a balloon, most of whose
// memory is free.
func linuxHints(variant kernel.Variant, words string, args ...string) *linux {
	return &linux{variant: variant, cpus: 1, memory: "256M", program: "memhog", words: "size=8M idle=100", kernel: words, args: args}
}

// linuxMoves is a Linux guest that is migrated on and on.
type linuxMoves struct {
	h    *host
	at   *proc
	n    int
	seen kernel.Report
}

func (l *linux) boot(t testing.TB) *linuxMoves {
	t.Helper()
	m := &linuxMoves{h: newHost(t)}
	m.at = l.booted(t).restore(m.h, "at0")
	m.seen = m.at.awaitBoot()
	return m
}

// move migrates the guest. There memhog goes on, and the kernel has nothing to
// complain of. Hints are waited for as long as can be: a guest whose ring 0 is
// emulated takes its time.
func (m *linuxMoves) move(t testing.TB, flags ...string) result {
	t.Helper()
	there, addr := m.h.receive(fmt.Sprintf("at%d", m.n+1))
	args := append([]string{fmt.Sprintf("at%d", m.n), "--to", addr, "--downtime-limit", "5s", "--hint-wait", "5s"}, flags...)
	r, exit := m.h.migrate(args...)
	if exit != 0 || r.Status != "completed" {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	m.at.wait()
	m.n++
	m.at = there
	m.seen = there.goesOn(m.seen)
	there.quietly(0)
	t.Logf("%s: %d pages named, %d of them in time, %d stayed off the wire, %d written again; %d sent, %d zero, %d holes; %d bytes, %d ms, of them %d waiting for hints, stopped for %.1f ms; %q",
		strings.Join(flags, " "), r.HintsReceived, r.inTime(), r.PagesHinted, r.HintsRewritten, r.PagesSent, r.PagesZero, r.PagesHole,
		r.BytesSent, r.TotalMS, r.HintWaitMS, r.DowntimeMS, r.HintsOff)
	return r
}

// mostlyFree is a number of pages that are free in such a guest.
const mostlyFree = 96 * mib / mempage.Size

// firstRound is what the first round sent. What later rounds send depends on how
// many there are, and so on the speed of the machine.
func (r *result) firstRound() uint64 { return r.Rounds[0].BytesSent }

// moveHinted moves the guest with hints until it has named a page in time: a slow
// guest may not begin to answer before the first round ends. complete reports
// whether it has named all that is free; it did if it answered in a second.
func (m *linuxMoves) moveHinted(t testing.TB, flags ...string) (r result, complete bool) {
	t.Helper()
	for range 10 {
		r = m.move(t, flags...)
		if r.inTime() > 0 {
			return r, r.HintWaitMS < 1000
		}
	}
	t.Fatalf("in 10 migrations the guest named no page in time: %+v", r)
	return r, false
}

// TestLinuxHints: what Linux's own driver hints stays off the wire, whatever
// the size of KVM's chunks. No page of its memory was zero or a hole before the
// kernel was loaded; it writes nothing to what it hints, and takes little of it
// back. The guest moves without hints first, since what they keep off the wire
// are holes where it arrives.
func TestLinuxHints(t *testing.T) {
	needKVM(t)
	t.Parallel()
	for _, shift := range []int{18, 6, 12}[:count(1, 3)] {
		m := linuxHints(kernel.NoACPI, "init_on_alloc=0", "--prefill").boot(t)
		off := m.move(t, "--hints", "off")
		on, complete := m.moveHinted(t, "--hints", "on", "--clear-bitmap-shift", fmt.Sprint(shift))
		// What the guest reported as free in between are holes, and not sent anyway.
		reported := on.PagesHole - min(on.PagesHole, off.PagesZero+off.PagesHole)
		named := on.inTime() - min(on.inTime(), reported)
		if complete && named < mostlyFree || on.PagesHinted*100 < named*95 {
			t.Errorf("shift %d: of %d pages that the guest named %d stayed off the wire", shift, named, on.PagesHinted)
		}
		if on.firstRound()+on.PagesHinted*mempage.Size*9/10 > off.firstRound() {
			t.Errorf("shift %d: %d bytes sent in the first round, %d without hints", shift, on.firstRound(), off.firstRound())
		}
	}
}

// TestLinuxHintsOfZeroedPages: with init_on_alloc=1 the kernel clears what it
// hints when its driver allocates it. That is a write after the announcement,
// so the page goes, but as a zero. Where pages held something before, asking
// pays; where they were holes, it does not, and auto does not go on with it.
func TestLinuxHintsOfZeroedPages(t *testing.T) {
	needKVM(t)
	t.Parallel()
	for _, mode := range []string{"auto", "on"}[:count(1, 2)] {
		m := linuxHints(kernel.NoACPI, "init_on_alloc=1", "--prefill").boot(t)
		off := m.move(t, "--hints", "off")
		flags := []string{"--hints", mode}
		if mode == "auto" {
			flags = append(flags, "--bandwidth-limit", "20M") // slower than the guest, so that waiting pays
		}
		on, complete := m.moveHinted(t, flags...)
		complete = complete && mode == "on" // auto does not wait longer than it pays
		spared := on.PagesHinted + on.PagesZero + on.PagesHole - min(on.PagesZero+on.PagesHole, off.PagesZero+off.PagesHole)
		if complete && on.inTime() < mostlyFree || spared*100 < on.inTime()*95 {
			t.Errorf("%s: of %d pages that the guest named in time %d went as zeros or holes, or not at all", mode, on.inTime(), spared)
		}
		// A slow guest clears pages that were sent before.
		if on.firstRound()+on.inTime()*mempage.Size*8/10 > off.firstRound() {
			t.Errorf("%s: %d bytes sent in the first round, %d without hints", mode, on.firstRound(), off.firstRound())
		}
	}
	if !full() {
		return
	}
	m := linuxHints(kernel.NoACPI, "init_on_alloc=1").boot(t)
	off := m.move(t, "--hints", "off")
	auto := m.move(t, "--hints", "auto")
	// The first verdict is on eight blocks, which a slow guest does not come to name.
	if auto.HintsReceived >= 8<<10 && !strings.Contains(auto.HintsOff, "init_on_alloc") || auto.HintsReceived*2 > off.PagesHole {
		t.Errorf("auto goes on asking a guest that populates its %d holes: %d pages named, %q", off.PagesHole, auto.HintsReceived, auto.HintsOff)
	}
}

// TestLinuxPoison: a kernel that checks its free pages for a pattern is not
// asked for hints, and the user is told why; one that clears what is freed is.
// Either has nothing to complain of after five migrations.
func TestLinuxPoison(t *testing.T) {
	needKVM(t)
	t.Parallel()
	for words, ask := range map[string]bool{"page_poison=1": false, "init_on_free=1": true} {
		t.Run(words, func(t *testing.T) {
			t.Parallel()
			m := linuxHints(kernel.Poison, words, "--prefill").boot(t)
			var named uint64
			for i := range 5 {
				before := m.at
				r := m.move(t, "--hints", "on")
				named += r.HintsReceived
				switch {
				case !ask && (r.HintsReceived != 0 || !strings.Contains(r.HintsOff, "pattern") || !strings.Contains(before.err.tail(5), r.HintsOff)):
					t.Errorf("migration %d: a guest that checks free pages was asked: %+v; stderr %q", i, r, before.err.tail(5))
				case ask && i == 0 && r.inTime() > r.PagesHole && r.PagesHinted == 0:
					// Later ones come while the kernel still clears what it had
					// hinted, by the worker that would answer: not at all on a slow
					// machine, or it names what are holes.
					t.Errorf("nothing that was hinted stayed off the wire: %+v", r)
				}
			}
			if ask && named == 0 {
				t.Error("in five migrations the guest named no page")
			}
		})
	}
}
