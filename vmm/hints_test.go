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

// moveHinted migrates a guest and returns the VM at the destination and the result.
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

// TestDemoGuestHints migrates the demo guest several times. Pages that it hints are not
// sent, although it takes half of them back at once and rewrites them, and it loses
// nothing. Each migration asks with a new id, also from another host: the driver
// ignores an id that it had before.
func TestDemoGuestHints(t *testing.T) {
	r := hintsOf(t, "fill=8M dirty=1M rate=50 verify=1 tick=1 pool=64M hintrace reports=0")
	answered := 0
	for n := 0; answered < 3; n++ {
		if n == 10 {
			t.Fatalf("in %d migrations, hints spared pages in %d", n, answered)
		}
		next, res := r.moveHinted(t, migrate.Options{Hints: migrate.HintsOn, HintWait: migrate.MaxHintWait})
		if res.PagesHinted > 0 {
			answered++
		} else {
			// On a busy host the guest may not answer in time. The migration then goes
			// on without hints.
			t.Logf("migration %d: %+v", n, res)
		}
		if res.HintsReceived >= 4<<20/mempage.Size && answered == 1 && res.HintsRewritten == 0 {
			t.Errorf("the guest has rewritten no page that it took back: %+v", res)
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

// TestHintsOfAGuestThatReboots: the guest of a migration under way is moved by its
// reboot. The next migration gets hints again.
func TestHintsOfAGuestThatReboots(t *testing.T) {
	r := hintsOf(t, "fill=8M dirty=1M rate=50 verify=1 tick=1 pool=64M reports=0")
	next := receiving(t, ReceiveConfig{})
	m, err := r.StartMigration(next.Addr().String(), migrate.Options{Hints: migrate.HintsOn, BandwidthLimit: migrate.MinBandwidthLimit})
	check(t, err)
	for deadline := vmtest.Within(t); m.Progress().Phase != migrate.PhasePrecopy; time.Sleep(time.Millisecond) {
		check(t, deadline.Err())
	}
	r.con.Type("reboot\n")
	if res := result(t, m); res.Status != "completed" || res.GuestResets != 1 {
		t.Fatalf("%+v", res)
	}
	r = next
	r.con.AwaitThat(t, "a pool", func(out string) bool { return strings.Contains(out, "is ready in") })
	r, res := r.moveHinted(t, migrate.Options{Hints: migrate.HintsOn, HintWait: migrate.MaxHintWait})
	if res.PagesHinted == 0 {
		t.Errorf("after the reboot: %+v", res)
	}
	r.con.AwaitPart(t, " bad=0 ")
	r.con.Type("poweroff\n")
	r.ends(t, PoweredOff, "")
}
