package test

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// downtimeLimit of the tests, the default.
const downtimeLimit = 300 // ms

// startDemo boots the demo guest and waits until it has filled its memory.
func (h *host) startDemo(name string, cpus, memMiB, fillMiB, dirtyMiB int, more ...string) *proc {
	h.t.Helper()
	args := []string{"run", name, "--cpus", strconv.Itoa(cpus), "--memory", fmt.Sprintf("%dM", memMiB),
		"--cmdline", fmt.Sprintf("fill=%dM dirty=%dM rate=0 verify=1 tick=1", fillMiB, dirtyMiB)}
	p := h.start(append(args, more...)...)
	p.out.awaitText(h.t, 0, "filled ")
	return p
}

// awaitVerified waits until all owned pages were verified since line from.
func awaitVerified(t testing.TB, l *lines, from int, owned uint64) (tick, int) {
	t.Helper()
	first, next := l.awaitTick(t, from, "any", func(tick) bool { return true })
	return l.awaitTick(t, next, fmt.Sprintf("verified %d more than %d", owned, first.verified),
		func(k tick) bool { return k.verified >= first.verified+owned })
}

// TestThereAndBack: a guest with 2 vCPUs that owns 400 of 512 MiB and rewrites 64 MiB
// flat out moves there and back. No page is bad, no tick is missing, and all pages are
// verified after each arrival. Some migrations hash each page at both sides. In the
// long runs, which need a quiet machine, the guest never stands still for longer than
// the limit, by its own clock.
func TestThereAndBack(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const owned = 400 * mib / mempage.Size
	here := h.startDemo("a0", 2, 512, 400, 64)
	awaitVerified(t, here.out, 0, owned)
	last := here.out.ticks()[len(here.out.ticks())-1]
	n, hashed := count(6, 50), count(2, 10)
	var downtimes []float64
	for i := range n {
		name := fmt.Sprintf("a%d", i+1)
		there, addr := h.receive(name)
		verify := i%(n/hashed) == 0
		args := []string{fmt.Sprintf("a%d", i), "--to", addr}
		if verify {
			args = append(args, "--verify-pages")
		}
		r, exit := h.migrate(args...)
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, r)
		}
		if here.wait() != 0 {
			t.Errorf("migration %d: the source exits %d", i, here.exit)
		}
		if text := here.err.tail(1); !strings.Contains(text, addr) {
			t.Errorf("the source's last line does not say where the guest went: %q", text)
		}
		for _, k := range here.out.ticks() { // every tick line of the source
			if k.bad != 0 {
				t.Errorf("bad tick at the source: %+v", k)
			}
		}
		if all := here.out.ticks(); len(all) > 0 {
			last = all[len(all)-1]
		}
		k, _ := awaitVerified(t, there.out, 0, owned)
		// The move may cut a line: the source has its beginning.
		if cut, ok := parseTick(here.out.tail(1) + there.out.snapshot()[0]); ok {
			last = cut
		}
		arrived := there.out.ticks()
		if arrived[0].n != last.n+1 {
			t.Errorf("migration %d: tick %d follows tick %d", i, arrived[0].n, last.n)
		}
		if k.writes <= last.writes {
			t.Errorf("migration %d: no writes after arrival", i)
		}
		if verify {
			here = there
			continue // the downtime limit does not include hashing
		}
		downtimes = append(downtimes, r.DowntimeMS)
		for _, k := range arrived {
			if full() && r.DowntimeNote == "" && k.gap > 1.2*downtimeLimit {
				t.Errorf("migration %d: the guest stood still for %.1f ms, 1.2 times %d were promised (downtime_ms %.1f)", i, k.gap, downtimeLimit, r.DowntimeMS)
			}
		}
		here = there
	}
	t.Logf("%d migrations, downtimes in ms: %.1f", n, downtimes)
	h.must("stop", "--force", fmt.Sprintf("a%d", n))
	if here.wait() != 0 {
		t.Errorf("a stopped VM exits %d", here.exit)
	}
}

// TestGuestRunsDuringPrecopy: the guest's writes rise from tick to tick.
func TestGuestRunsDuringPrecopy(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	p := h.start("run", "src", "--cpus", "1", "--memory", "256M",
		"--cmdline", "fill=128M dirty=8M rate=2000 verify=1 tick=0.5")
	filled := p.out.awaitText(t, 0, "filled ")
	there, addr := h.receive("dst")
	before, _ := p.out.awaitTick(t, filled, "with writes", func(k tick) bool { return k.writes > 0 })
	// 128 MiB at 1 MiB/s take two minutes: the migration lasts until it is cancelled.
	mig := h.start("migrate", "src", "--to", addr, "--bandwidth-limit", "1M", "--json")
	h.awaitMigrating("src", 1)
	from := p.out.len()
	for range 4 {
		var k tick
		k, from = p.out.awaitTick(t, from, "during precopy", func(tick) bool { return true })
		if k.writes <= before.writes {
			t.Errorf("the guest does not write during precopy: %+v then %+v", before, k)
		}
		before = k
	}
	if s := h.info("src").State; s != "migrating" {
		t.Errorf("the source is %q", s)
	}
	h.must("migrate", "src", "--cancel")
	mig.wait()
	there.err.awaitText(t, 0, "cancelled")
	r, exit := h.migrate("src", "--to", addr, "--bandwidth-limit", "64M")
	if exit != 0 {
		t.Fatalf("exit %d, %+v", exit, r)
	}
	if r.TotalMS < 1500 {
		t.Errorf("128 MiB took %d ms at 64 MiB/s", r.TotalMS)
	}
	if r.PagesHole == 0 || r.PagesSent < 128*mib/mempage.Size {
		t.Errorf("of a guest that owns 128 of 256 MiB went %d pages, %d holes", r.PagesSent, r.PagesHole)
	}
	awaitVerified(t, there.out, 0, 128*mib/mempage.Size)
}

// TestPagesThatTurnZero: pages that become zero, and data again, are right at both
// ends.
func TestPagesThatTurnZero(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	p := h.start("run", "src", "--memory", "128M", "--cmdline", "fill=64M dirty=32M rate=0 zeros=3 verify=1 tick=1")
	p.out.awaitText(t, 0, "filled ")
	for i := range 3 {
		there, addr := h.receive(fmt.Sprintf("z%d", i))
		from := "src"
		if i > 0 {
			from = fmt.Sprintf("z%d", i-1)
		}
		r, exit := h.migrate(from, "--to", addr, "--verify-pages", "--clear-bitmap-shift", []string{"6", "12", "31"}[i])
		if exit != 0 {
			t.Fatalf("%+v", r)
		}
		if r.PagesZero == 0 {
			t.Errorf("no zero page among %+v", r)
		}
		awaitVerified(t, there.out, 0, 64*mib/mempage.Size)
	}
}

// TestBackings: each kind of memory, from each to itself.
func TestBackings(t *testing.T) {
	needKVM(t)
	for _, kind := range []string{"memfd", "anonymous", "hugetlb"} {
		t.Run(kind, func(t *testing.T) {
			if kind == "hugetlb" {
				reserveHugePages(t, 160)
			}
			h := newHost(t)
			h.startDemo("src", 2, 128, 64, 16, "--memory-backing", kind)
			if kind == "hugetlb" { // the pool is the host's to give
				_, addr := h.receive("other")
				r, exit := h.migrate("src", "--to", addr)
				if exit < 3 || !strings.Contains(r.Error, "--memory-backing hugetlb") {
					t.Errorf("a pool that was not given: exit %d, %+v", exit, r)
				}
			}
			there, addr := h.receive("dst", "--memory-backing", kind)
			r, exit := h.migrate("src", "--to", addr, "--verify-pages")
			if exit != 0 {
				t.Fatalf("%+v", r)
			}
			if r.PagesHole == 0 {
				t.Errorf("%s: no holes, of a guest that owns half of its memory", kind)
			}
			awaitVerified(t, there.out, 0, 64*mib/mempage.Size)
		})
	}
}

// TestMemoryAboveTheHole: memory above the hole below 4 GiB is sent too.
func TestMemoryAboveTheHole(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	mem := 4096
	p := h.start("run", "src", "--memory", fmt.Sprintf("%dM", mem), "--cmdline", "fill=3400M dirty=16M rate=500 verify=4 tick=1")
	p.out.awaitText(t, 0, "filled ")
	there, addr := h.receive("dst")
	r, exit := h.migrate("src", "--to", addr)
	if exit != 0 {
		t.Fatalf("%+v", r)
	}
	if r.RAMBytes != uint64(mem)*mib {
		t.Errorf("ram_bytes %d", r.RAMBytes)
	}
	awaitVerified(t, there.out, 0, 3400*mib/mempage.Size)
}

// TestPausedArrivesPaused: a paused guest arrives paused, and runs when it is resumed.
func TestPausedArrivesPaused(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	src := h.startDemo("src", 2, 128, 64, 16)
	h.must("pause", "src")
	if s := h.info("src").State; s != "paused" {
		t.Fatalf("state %q after pause", s)
	}
	quiet := src.out.len()
	there, addr := h.receive("dst")
	if r, exit := h.migrate("src", "--to", addr, "--verify-pages"); exit != 0 {
		t.Fatalf("%+v", r)
	}
	if s := h.info("dst").State; s != "paused" {
		t.Errorf("it arrived %q", s)
	}
	if src.out.len() != quiet || there.out.len() != 0 {
		t.Error("a paused guest printed something")
	}
	h.must("resume", "dst")
	awaitVerified(t, there.out, 0, 64*mib/mempage.Size)
}

// TestCancel: after a cancelled migration the guest goes on at the source, the
// destination says why, and both can be used again.
func TestCancel(t *testing.T) {
	needKVM(t)
	for _, how := range []string{"--cancel", "SIGINT"} {
		t.Run(how, func(t *testing.T) {
			h := newHost(t)
			src := h.startDemo("src", 2, 256, 128, 16)
			there, addr := h.receive("dst")
			mig := h.start("migrate", "src", "--to", addr, "--bandwidth-limit", "1M", "--json")
			h.awaitMigrating("src", 0)
			if how == "SIGINT" {
				mig.kill(syscall.SIGINT)
			} else {
				h.must("migrate", "src", "--cancel")
			}
			if mig.wait() != 6 {
				t.Errorf("a cancelled migrate exits %d", mig.exit)
			}
			if r := decodeResult(t, mig.out.tail(100), ""); r.Status != "cancelled" {
				t.Errorf("status %q (%s)", r.Status, r.Error)
			}
			there.err.awaitText(t, 0, "cancelled")
			if s := h.info("src").State; s != "running" {
				t.Errorf("the source is %q", s)
			}
			at := src.out.len()
			awaitVerified(t, src.out, at, 128*mib/mempage.Size)
			if r, exit := h.migrate("src", "--to", addr); exit != 0 {
				t.Fatalf("the same destination again: %+v", r)
			}
			awaitVerified(t, there.out, 0, 128*mib/mempage.Size)
		})
	}
}

// TestLimitsGiveUp: a migration that does not converge fails, and the guest goes on at
// the source.
func TestLimitsGiveUp(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	src := h.startDemo("src", 2, 128, 64, 48)
	_, addr := h.receive("dst")
	for _, args := range [][]string{
		{"--max-rounds", "2", "--bandwidth-limit", "64M", "--downtime-limit", "1ms"},
		{"--timeout", "2s", "--bandwidth-limit", "4M"},
	} {
		r, exit := h.migrate(append([]string{"src", "--to", addr}, args...)...)
		if exit < 3 || r.Status != "failed" || r.Error == "" {
			t.Errorf("%v: exit %d, %+v", args, exit, r)
		}
		at := src.out.len()
		src.out.awaitTick(t, at, "after giving up", func(tick) bool { return true })
	}
}
