package vmm

import (
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
)

// hintsOf starts the demo guest with a pool, which it hints, and waits until
// the pool is ready.
func hintsOf(t *testing.T, cmdline string) *ran {
	t.Helper()
	needKVM(t)
	con := vmtest.NewTape()
	vm, err := NewVM(Config{CPUs: 1, Memory: 96 << 20, Serial: con, Log: vmtest.Log(t), Cmdline: cmdline, Devices: []virtio.Spec{&balloon.Spec{}}})
	check(t, err)
	r := run(t, vm, con)
	con.AwaitPart(t, "is ready in")
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
		r.con.AwaitPart(t, "tick")
		r.con.AwaitPart(t, " bad=0 ")
	}
	if strings.Contains(r.con.Text(), "bad page") {
		t.Error(r.con.Text())
	}
	r.con.Type("poweroff\n")
	r.ends(t, PoweredOff, "")
}

// TestHintsOfAGuestThatReboots: the migration ends with the machine, and the
// next one, of the machine after it, gets hints again.
func TestHintsOfAGuestThatReboots(t *testing.T) {
	r := hintsOf(t, "fill=8M dirty=1M rate=50 verify=1 tick=1 pool=64M reports=0")
	next := receiving(t, ReceiveConfig{})
	m, err := r.StartMigration(next.Addr().String(), migrate.Options{Hints: migrate.HintsOn, BandwidthLimit: migrate.MinBandwidthLimit})
	check(t, err)
	for deadline := vmtest.Within(t); m.Progress().Phase != migrate.PhasePrecopy; time.Sleep(time.Millisecond) {
		check(t, deadline.Err())
	}
	r.con.Type("reboot\n")
	if res := result(t, m); res.Status == "completed" {
		t.Fatalf("%+v", res)
	}
	r.con.AwaitThat(t, "a second pool", func(out string) bool { return strings.Count(out, "is ready in") == 2 })
	r, res := r.moveHinted(t, migrate.Options{Hints: migrate.HintsOn, HintWait: migrate.MaxHintWait})
	if res.PagesHinted == 0 {
		t.Errorf("after the reboot: %+v", res)
	}
	r.con.AwaitPart(t, " bad=0 ")
	r.con.Type("poweroff\n")
	r.ends(t, PoweredOff, "")
}
