package vmm

import (
	"errors"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testhook"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/machine"
)

// TestRingMigrates: a guest that rewrites memory as fast as it can moves from a machine
// with rings to another, and from there to one with a bitmap. Every page is compared.
func TestRingMigrates(t *testing.T) {
	needKVM(t)
	con := vmtest.NewTape()
	vm, err := NewVM(Config{Name: "ring", CPUs: 2, Memory: 64 << 20, Serial: con, Log: vmtest.Log(t), Tracking: machine.TrackRing,
		Cmdline: "fill=32M dirty=16M rate=0 verify=0.5 tick=0.5"})
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("THIS KERNEL HAS NO DIRTY RING, not tested: %v", err)
	}
	check(t, err)
	here := run(t, vm, con)
	con.AwaitPart(t, "tick 2 ")
	for _, tracking := range []machine.DirtyTracking{machine.TrackRing, machine.TrackBitmap} {
		if here.current().Tracking() != machine.TrackRing || here.current().ManualProtect() {
			t.Fatal("the machine has no rings")
		}
		there := receiving(t, ReceiveConfig{Tracking: tracking})
		m, err := here.StartMigration(there.Addr().String(), migrate.Options{VerifyPages: true, DowntimeLimit: patience})
		check(t, err)
		if r := result(t, m); r.Status != "completed" {
			t.Fatalf("%+v", r)
		}
		there.con.AwaitPart(t, "tick ")
		there.con.AwaitPart(t, " bad=0 ")
		if text := there.con.Text(); strings.Contains(text, "bad page") {
			t.Error(text)
		}
		here = there
	}
	if got := here.current().Tracking(); got != machine.TrackBitmap {
		t.Errorf("the last machine tracks writes by %s", got)
	}
	check(t, here.Stop(vmtest.Within(t)))
}

// TestSmallRings: rings that are full all the time lose nothing. The guest goes on after
// a migration that does not converge.
func TestSmallRings(t *testing.T) {
	needKVM(t)
	testhook.RingBytes.Store(4096)
	defer testhook.RingBytes.Store(0)
	con := vmtest.NewTape()
	vm, err := NewVM(Config{Name: "ring", CPUs: 2, Memory: 64 << 20, Serial: con, Log: vmtest.Log(t), Tracking: machine.TrackRing,
		Cmdline: "fill=32M dirty=16M rate=0 verify=0.5 tick=0.5"})
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("THIS KERNEL HAS NO DIRTY RING, not tested: %v", err)
	}
	check(t, err)
	here := run(t, vm, con)
	con.AwaitPart(t, "tick 2 ")
	there := receiving(t, ReceiveConfig{})
	m, err := here.StartMigration(there.Addr().String(), migrate.Options{BandwidthLimit: 16 << 20, MaxRounds: 1, DowntimeLimit: 1e6})
	check(t, err)
	if r := result(t, m); r.Status != "failed" || !strings.Contains(r.Error, "did not converge") {
		t.Fatalf("%+v", r)
	}
	here.con.AwaitPart(t, "tick 4 ")
	check(t, there.Stop(vmtest.Within(t)))
	there = receiving(t, ReceiveConfig{})
	m, err = here.StartMigration(there.Addr().String(), migrate.Options{VerifyPages: true, DowntimeLimit: patience})
	check(t, err)
	if r := result(t, m); r.Status != "completed" {
		t.Fatalf("%+v", r)
	}
	there.con.AwaitPart(t, " bad=0 ")
	check(t, there.Stop(vmtest.Within(t)))
}
