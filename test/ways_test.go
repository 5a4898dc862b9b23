package test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// way is how a guest is moved: how its writes are tracked at the source, and the
// options of govmm migrate.
type way struct {
	tracking string
	channels int
	compress string
	hints    string
	shift    int
}

// ways are a few in which each value of each option occurs, or all combinations in the
// long runs.
func ways() (all []way) {
	if !full() {
		return []way{
			{"bitmap", 1, "zstd", "on", 18},
			{"ring", 3, "none", "on", 6},
			{"bitmap", 16, "lz4", "off", 6},
			{"ring", 1, "lz4", "on", 12},
			{"ring", 16, "zstd", "off", 18},
			{"bitmap", 3, "none", "on", 12},
		}
	}
	for _, tracking := range []string{"bitmap", "ring"} {
		for _, compress := range []string{"none", "zstd", "lz4"} {
			for i, channels := range []int{1, 3, 16} {
				for j, hints := range []string{"on", "off"} {
					all = append(all, way{tracking, channels, compress, hints, []int{18, 6, 12}[(i+j)%3]})
				}
			}
		}
	}
	return all
}

// TestEveryWay: a guest writes flat out, has pages that turn zero, hints memory and
// rewrites some of it. It moves again and again, each time in another way. Each page is
// hashed at both sides, and checked by the guest.
func TestEveryWay(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const owned = 32 * mib / mempage.Size
	all := ways()
	here := h.start("run", "w0", "--cpus", "2", "--memory", "192M", "--dirty-tracking", all[0].tracking, "--cmdline",
		"fill=32M dirty=8M rate=0 zeros=5 verify=1 tick=1 pool=96M keep=16M hintrace reports=0")
	here.out.awaitText(t, 0, "is ready in")
	awaitVerified(t, here.out, 0, owned)
	for i, w := range all {
		next := all[(i+1)%len(all)]
		there, addr := h.receive(fmt.Sprintf("w%d", i+1), "--dirty-tracking", next.tracking)
		r, exit := h.migrate(fmt.Sprintf("w%d", i), "--to", addr, "--verify-pages", "--channels", fmt.Sprint(w.channels),
			"--compress", w.compress, "--hints", w.hints, "--clear-bitmap-shift", fmt.Sprint(w.shift))
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("%+v: exit %d, %+v", w, exit, r)
		}
		if here.wait() != 0 {
			t.Errorf("%+v: the source exits %d", w, here.exit)
		}
		if r.Channels != w.channels || len(r.ChannelBytes) != w.channels || slices.Contains(r.ChannelBytes, 0) {
			t.Errorf("%+v: %d channels, with bytes %d", w, r.Channels, r.ChannelBytes)
		}
		if compressed := r.CompressionRatio > 1; r.Compression != w.compress || compressed != (w.compress != "none") {
			t.Errorf("%+v: compression %s, pages are %.2f times shorter", w, r.Compression, r.CompressionRatio)
		}
		if w.hints == "off" && r.HintsReceived > 0 {
			t.Errorf("%+v: %d pages were hinted", w, r.HintsReceived)
		}
		awaitChecked(t, there.out, owned)
		here = there
	}
}

// TestAutoConverge: a guest that writes twice as fast as the link sends arrives only
// with --auto-converge. It is no longer throttled after the migration: at the
// destination, and at the source if the migration failed.
func TestAutoConverge(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const rate = 8000 // pages a second, 33 MB
	src := h.start("run", "src", "--memory", "64M", "--cmdline", fmt.Sprintf("fill=12M dirty=8M rate=%d verify=1 tick=1", rate))
	src.out.awaitText(t, 0, "filled ")
	awaitPace(t, src.out, 0, rate/2)
	// 8 MiB take half a second.
	slowly := func(addr string, more ...string) (result, int) {
		return h.migrate(append([]string{"src", "--to", addr, "--bandwidth-limit", "16M", "--downtime-limit", "200ms"}, more...)...)
	}

	_, addr := h.receive("dst")
	r, exit := slowly(addr, "--auto-converge", "--timeout", "8s", "--downtime-limit", "1ms")
	if exit < 3 || r.Status != "failed" || r.ThrottlePercent == 0 {
		t.Errorf("with a limit that cannot be kept: exit %d, %+v", exit, r)
	}
	awaitPace(t, src.out, src.out.len(), rate/2)

	r, exit = slowly(addr, "--max-rounds", "6")
	if exit < 3 || r.ThrottlePercent != 0 {
		t.Fatalf("without it: exit %d, %+v", exit, r)
	}
	there, addr := h.receive("there")
	r, exit = slowly(addr, "--auto-converge", "--timeout", "10m")
	if exit != 0 || r.ThrottlePercent == 0 {
		t.Fatalf("with it: exit %d, %+v", exit, r)
	}
	t.Logf("throttled to %d%%, %d rounds, downtime %.1f ms", r.ThrottlePercent, len(r.Rounds), r.DowntimeMS)
	awaitPace(t, there.out, 0, rate/2)
	awaitVerified(t, there.out, 0, 12*mib/mempage.Size)
}

// awaitPace waits until the demo guest writes that many pages a second by its own
// clock. A guest that was throttled may still have lines of that time to print.
func awaitPace(t testing.TB, l *lines, from int, rate float64) {
	t.Helper()
	last, from := l.awaitTick(t, from, "any", func(tick) bool { return true })
	l.awaitTick(t, from, fmt.Sprintf("%.0f pages written a second", rate), func(k tick) bool {
		since := last
		last = k
		return k.up > since.up && float64(k.writes-since.writes) >= rate*(k.up-since.up)
	})
}
