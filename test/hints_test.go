package test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// TestHintraceThereAndBack: a guest hints the free pages of a pool and takes half of
// them back at once. It rewrites those, some before the device has read the hint, and
// checks them from then on. It moves there and back: no write is lost, and pages that
// stayed free are not sent. The guest's count of hints shows that it was asked again.
func TestHintraceThereAndBack(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	here := h.start("run", "h0", "--cpus", "2", "--memory", "256M", "--cmdline",
		"fill=32M dirty=4M rate=0 verify=1 tick=1 pool=128M keep=16M hintrace reports=0")
	here.out.awaitText(t, 0, "is ready in")
	awaitVerified(t, here.out, 0, 32*mib/mempage.Size)
	var kept, hinted uint64
	n, answered := count(3, 100), 0
	// Where the guest had no time to answer, it moves more often.
	for i := 0; i < n || answered*2 < n && i < 3*n; i++ {
		there, addr := h.receive(fmt.Sprintf("h%d", i+1))
		r, exit := h.migrate(fmt.Sprintf("h%d", i), "--to", addr, "--hints", "on", "--hint-wait", "5s", "--clear-bitmap-shift",
			fmt.Sprint([]int{18, 6, 12}[i%3]))
		if exit != 0 || r.Status != "completed" {
			t.Fatalf("migration %d: exit %d, %+v", i, exit, r)
		}
		if here.wait() != 0 {
			t.Errorf("migration %d: the source exits %d", i, here.exit)
		}
		k := awaitChecked(t, there.out, 32*mib/mempage.Size)
		if r.PagesHinted > 0 {
			answered++
			kept += r.PagesHinted
			if k.more["hinted"] <= hinted || k.more["retaken"] == 0 {
				t.Errorf("after migration %d the guest has hinted %d pages and taken back %d; before it, hinted %d",
					i, k.more["hinted"], k.more["retaken"], hinted)
			}
		} else {
			t.Logf("migration %d: nothing stayed off the wire of %d pages that were hinted: %q", i, r.HintsReceived, r.HintsOff)
		}
		hinted = k.more["hinted"]
		here = there
	}
	if answered*2 < n {
		t.Errorf("hints kept pages off the wire in %d migrations, expected %d or more", answered, (n+1)/2)
	}
	for _, line := range here.out.snapshot() {
		if strings.Contains(line, "bad page") || strings.Contains(line, "bad notes") {
			t.Error(line)
		}
	}
	t.Logf("in %d migrations hints kept pages off the wire, %d on average", answered, kept/uint64(max(answered, 1)))
}

// awaitChecked waits until a guest that has just arrived has checked all pages that it
// owns and all full pages of its pool. Each tick must have bad=0.
func awaitChecked(t testing.TB, l *lines, owned uint64) tick {
	t.Helper()
	first, next := l.awaitTick(t, 0, "any", func(tick) bool { return true })
	k, _ := l.awaitTick(t, next, "all verified", func(k tick) bool {
		return k.verified >= first.verified+owned && k.more["checked"] >= first.more["checked"]+first.more["pool"]
	})
	return k
}

// TestHintsOfAGuestWithoutABalloon: a guest that cannot be asked is migrated without
// hints, and the user is told.
func TestHintsOfAGuestWithoutABalloon(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	h.startDemo("n0", 1, 64, 8, 1, "--balloon=false")
	_, addr := h.receive("n1")
	out, errs, exit := h.run("migrate", "n0", "--to", addr, "--hints", "on", "--json")
	r := decodeResult(t, out, errs)
	if exit != 0 || r.Status != "completed" || !strings.Contains(r.HintsOff, "no balloon") || !strings.Contains(errs, "no balloon") {
		t.Errorf("exit %d, %+v, %q", exit, r, errs)
	}
}
