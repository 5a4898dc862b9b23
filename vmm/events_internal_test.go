package vmm

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/report"
)

func eventsOf(t *testing.T, v *VM, after uint64) (all []Event) {
	t.Helper()
	seq, err := v.Events(t.Context(), after, false)
	check(t, err)
	for e := range seq {
		all = append(all, e)
	}
	return all
}

// Who asks for events that are gone is told how many, and misses none of the others.
func TestEventsAreKept(t *testing.T) {
	v := &VM{}
	if all := eventsOf(t, v, 0); len(all) != 0 {
		t.Errorf("%+v", all)
	}
	for range 3 {
		v.events.add(Event{Type: EventReset})
	}
	if all := eventsOf(t, v, 1); len(all) != 2 || all[0].Seq != 2 || all[1].Seq != 3 || all[0].Time.IsZero() {
		t.Errorf("%+v", all)
	}
	for range maxEvents {
		v.events.add(Event{Type: EventReset, Message: strings.Repeat("x\n", maxEventText)})
	}
	all := eventsOf(t, v, 1)
	if len(all) != maxEvents+1 || all[0].Type != EventLost || all[0].Seq != 3 || all[0].Lost != 2 || all[1].Seq != 4 || all[maxEvents].Seq != maxEvents+3 {
		t.Errorf("%d events, %+v", len(all), all[0])
	}
	if m := all[1].Message; len(m) > 2*maxEventText || strings.Contains(m, "\n") {
		t.Errorf("%d bytes: %.20q", len(m), m)
	}
	if _, err := v.Events(t.Context(), maxEvents+4, true); !errors.Is(err, ErrInvalid) {
		t.Errorf("an event that nobody has seen: %v", err)
	}
}

// A guest that fails a million requests fills neither the memory nor the list.
func TestEventsArePaced(t *testing.T) {
	v := &VM{}
	for range 100000 {
		v.events.addPaced(Event{Type: EventDiskError, Device: "disk a"})
	}
	v.events.addPaced(Event{Type: EventDiskError, Device: "disk b"})
	time.Sleep(2 * eventPace)
	v.events.addPaced(Event{Type: EventDiskError, Device: "disk a"})
	all := eventsOf(t, v, 0)
	more := 0
	for _, e := range all {
		more += e.More
	}
	last := all[len(all)-1]
	if last.Device != "disk a" || more+len(all) != 100002 || len(all) > 200 {
		t.Errorf("%d events for 100002, %d more", len(all), more)
	}
}

// A reader that sleeps is overtaken, told so, and keeps nobody waiting; the end of the VM ends
// all readers.
func TestEventsDoNotWait(t *testing.T) {
	v := &VM{}
	ctx, leave := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	seen := make([]uint64, 3)
	begun := make(chan struct{}, 3)
	for i := range seen {
		seq, err := v.Events(ctx, 0, true)
		check(t, err)
		readers.Go(func() {
			for e := range seq {
				if e.Type == EventLost {
					seen[i] += e.Lost
				} else {
					seen[i]++
				}
				select {
				case begun <- struct{}{}:
				default:
				}
				if i > 0 {
					time.Sleep(time.Duration(i) * 50 * time.Microsecond)
				}
			}
		})
	}
	v.events.add(Event{Type: EventReset})
	<-begun
	for range 9999 {
		v.events.add(Event{Type: EventReset})
	}
	v.events.end()
	v.events.add(Event{Type: EventReset}) // nothing happens after the end
	readers.Wait()
	leave()
	for i, n := range seen {
		if n != 10000 {
			t.Errorf("reader %d saw %d events", i, n)
		}
	}
}

// The life of a VM as its events tell it, and its migrations after their ends.
func TestVMEvents(t *testing.T) {
	vm := obeying(t)
	vm.con.Type("r")
	vm.con.Await(t, "BB")
	check(t, vm.Pause(t.Context()))
	check(t, vm.Resume(t.Context(), false))
	var kept []MigrationRecord
	vm.OnMigration(func(r MigrationRecord) { kept = append(kept, r) })

	opt := migrate.Options{ID: "one", Trigger: "drain"}
	m, err := vm.StartMigration("127.0.0.1:1", opt)
	check(t, err)
	if again, err := vm.StartMigration("127.0.0.1:1", opt); err != nil || again != m {
		t.Errorf("the same id: %p, %v; want %p", again, err, m)
	}
	if _, err := vm.StartMigration("127.0.0.1:2", opt); !errors.Is(err, ErrMigrationID) || !errors.Is(err, ErrState) {
		t.Errorf("the same id, elsewhere: %v", err)
	}
	if r := result(t, m); r.Reason != report.ReasonUnreachable || r.FailedIn != migrate.PhaseConnecting || r.ID != "one" {
		t.Errorf("%+v", r)
	}
	<-vm.lastMigration().settled
	if again, err := vm.StartMigration("127.0.0.1:1", opt); err != nil || again != m {
		t.Errorf("the same id after the end: %v", err)
	}
	if _, err := vm.StartMigration("127.0.0.1:1", migrate.Options{ID: "../x"}); !errors.Is(err, ErrInvalid) {
		t.Errorf("an id that is a path: %v", err)
	}

	next := receiving(t, ReceiveConfig{Name: "next"})
	checked, err := vm.CheckMigration(t.Context(), next.Addr().String(), migrate.Options{})
	if err != nil || !checked.Possible || checked.Version != int(migrate.Version) || checked.RAMBytes != 16<<20 || checked.Channels < 1 {
		t.Errorf("check: %+v, %v", checked, err)
	}
	if checked, err = vm.CheckMigration(t.Context(), "127.0.0.1:1", migrate.Options{}); err != nil || checked.Possible || checked.Reason != report.ReasonUnreachable || len(checked.Reasons) != 1 {
		t.Errorf("check of nobody: %+v, %v", checked, err)
	}
	vm.is(t, StateRunning)
	if r := vm.migrateTo(t, next.Addr().String()); r.Status != "completed" {
		t.Fatalf("%+v", r)
	}
	vm.ends(t, Migrated, "the guest runs at "+next.Addr().String()+" now")

	var said []string
	rounds := 0
	for _, e := range eventsOf(t, vm.VM, 0) {
		switch e.Type {
		case EventState:
			said = append(said, string(e.State))
		case EventMigration:
			if e.Migration == "one" {
				said = append(said, e.Migration+" "+string(e.Phase)+string(e.Reason))
			} else if e.Phase != migrate.PhaseSetup {
				said = append(said, string(e.Phase))
			}
		case EventRound:
			rounds++
		default:
			said = append(said, string(e.Type))
		}
	}
	want := "running reset paused running one connecting migrating one failedunreachable running connecting migrating precopy switchover completed migrated"
	got := strings.Join(said, " ")
	if got = strings.Replace(got, "precopy switchover precopy ", "precopy ", 1); got != want { // a trial stop
		t.Errorf("events: %s\nwant:   %s", got, want)
	}
	if rounds < 1 {
		t.Error("no round")
	}
	all := vm.Migrations()
	if len(all) != 2 || len(kept) != 2 || all[0].ID != "one" || all[0].Trigger != "drain" || all[1].ID == "" || all[1].Trigger != "api" ||
		all[1].Result == nil || all[1].Result.Downtime == 0 || all[1].Ended.IsZero() || kept[1].ID != all[1].ID {
		t.Errorf("%+v", all)
	}
	if _, err := vm.StartMigration(next.Addr().String(), migrate.Options{ID: "two"}); err == nil {
		t.Error("a guest that is gone was migrated")
	}
}

// A panic is an event, and so is a source that is refused.
func TestPanicEvent(t *testing.T) {
	vm := running(t, testConfig(1, panicking), "B")
	ctx := vmtest.Within(t)
	seq, err := vm.Events(ctx, 0, true)
	check(t, err)
	var types []string
	for e := range seq {
		if types = append(types, string(e.Type)+string(e.State)); e.State == StatePanicked {
			break
		}
	}
	if got := strings.Join(types, " "); !strings.Contains(got, "panic") || ctx.Err() != nil {
		t.Errorf("%s", got)
	}
}
