package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/report"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

// Scripts read these numbers.
func TestMigrateExitStatus(t *testing.T) {
	for _, tc := range []struct {
		res    migrate.Result
		err    error
		status int
	}{
		{migrate.Result{}, errors.New("no VM"), 1},
		{migrate.Result{Status: "failed", Reason: report.ReasonRefused, FailedIn: migrate.PhaseSetup}, errors.New("x"), 3},
		{migrate.Result{Status: "failed", Reason: report.ReasonUnreachable, FailedIn: migrate.PhaseConnecting}, errors.New("x"), 4},
		{migrate.Result{Status: "failed", Reason: report.ReasonLost, FailedIn: migrate.PhasePrecopy}, errors.New("x"), 4},
		{migrate.Result{Status: "failed", Reason: report.ReasonLost, FailedIn: migrate.PhaseSwitchover}, errors.New("x"), 5},
		{migrate.Result{Status: "cancelled", Reason: report.ReasonCancelled, FailedIn: migrate.PhasePrecopy}, errors.New("x"), 6},
		{migrate.Result{Status: "failed", Reason: report.ReasonHandoffUnknown, FailedIn: migrate.PhaseHandoffUnknown}, errors.New("x"), 7},
		{migrate.Result{Status: "failed"}, errDied, 7},
		{migrate.Result{Status: "failed"}, errLeft, 7},
		{migrate.Result{Status: "failed"}, errHandoffUnknown, 7},
	} {
		if got := exitStatus(tc.res, tc.err); got != tc.status {
			t.Errorf("%+v, %v: %d, want %d", tc.res, tc.err, got, tc.status)
		}
	}
}

func TestMigrateCheck(t *testing.T) {
	c := newCLI(t)
	vm := &fakeVM{check: migrate.CheckResult{Possible: true, Version: 3, Channels: 2, RAMBytes: 512 << 20}}
	c.serve("db", vm)
	exit, out, _ := c.run("migrate", "db", "--check", "--to", "h:1")
	if exit != 0 || !strings.Contains(out, "can go to h:1") || !strings.Contains(out, "512 MiB") {
		t.Errorf("%d %s", exit, out)
	}
	vm.mu.Lock()
	vm.check = migrate.CheckResult{Reasons: []string{"disk a.img: missing", "memory: too little"}, Reason: report.ReasonRefused}
	vm.mu.Unlock()
	exit, out, errs := c.run("migrate", "db", "--check", "--to", "h:1")
	if exit != exitRefused || out != "disk a.img: missing\nmemory: too little\n" {
		t.Errorf("%d %q", exit, out)
	}
	oneLine(t, errs, "--check: the guest cannot go to h:1")
	exit, out, _ = c.run("migrate", "db", "--check", "--json", "--to", "h:1")
	var r migrate.CheckResult
	if err := json.Unmarshal([]byte(out), &r); err != nil || exit != exitRefused || r.Possible || len(r.Reasons) != 2 {
		t.Errorf("%d %s", exit, out)
	}
	if exit, _, _ := c.run("migrate", "db", "--check", "--estimate", "--to", "h:1"); exit != exitUsage {
		t.Errorf("--check --estimate: %d", exit)
	}
}

// What is kept is bounded, and is listed with what VMs know that run.
func TestMigrations(t *testing.T) {
	c := newCLI(t)
	state := t.TempDir()
	t.Setenv("XDG_STATE_HOME", state)
	c.env = append(c.env, "XDG_STATE_HOME="+state)
	dir, err := api.MakeStateDirectory()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Truncate(time.Second)
	write := func(id string, at time.Time, res *migrate.Result) {
		t.Helper()
		if err := api.WriteRecord(dir, vmm.MigrationRecord{ID: id, VM: "db", Address: "h:1", Trigger: "cli", Started: at, Ended: at, Result: res}); err != nil {
			t.Fatal(err)
		}
	}
	write("old", now.Add(-31*24*time.Hour), &migrate.Result{Status: "completed"})
	write("first", now.Add(-2*time.Hour), &migrate.Result{Status: "completed", Total: time.Second, Downtime: 5 * time.Millisecond})
	write("second", now.Add(-time.Hour), &migrate.Result{Status: "failed", Reason: report.ReasonRefused, FailedIn: migrate.PhaseSetup, Error: "no"})
	c.serve("db", &fakeVM{records: []vmm.MigrationRecord{{ID: "first"}, {ID: "third", VM: "db", Started: now, Progress: &migrate.Progress{Phase: migrate.PhasePrecopy}}}})
	exit, out, errs := c.run("migrations")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if exit != 0 || errs != "" || len(lines) != 4 || !strings.HasPrefix(lines[1], "third ") || !strings.Contains(lines[1], "precopy") ||
		!strings.HasPrefix(lines[2], "second ") || !strings.Contains(lines[2], "failed (refused)") || !strings.Contains(lines[3], "5ms") {
		t.Errorf("%d %s%s", exit, out, errs)
	}
	exit, out, _ = c.run("migrations", "second", "--json")
	var r vmm.MigrationRecord
	if err := json.Unmarshal([]byte(out), &r); err != nil || exit != 0 || r.Result == nil || r.Result.Error != "no" {
		t.Errorf("%d %s", exit, out)
	}
	exit, out, _ = c.run("migrations", "second")
	if exit != 0 || !strings.Contains(out, "failed in phase setup (refused): no") {
		t.Errorf("%d %s", exit, out)
	}
	exit, _, errs = c.run("migrations", "old")
	if exit != exitFailed {
		t.Errorf("a record of 31 days is kept: %d", exit)
	}
	oneLine(t, errs, `none with the id "old"`)

	for i := range 1005 {
		write("x", now.Add(time.Duration(i)*time.Millisecond), nil)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1000 {
		t.Errorf("%d files, %v", len(files), err)
	}
	if st, err := os.Stat(filepath.Join(dir, files[0].Name())); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "zz.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	exit, _, errs = c.run("migrations")
	if exit != 0 || !strings.Contains(errs, "zz.json") {
		t.Errorf("a broken record: %d %s", exit, errs)
	}
}

func TestEventsCommand(t *testing.T) {
	c := newCLI(t)
	c.serve("db", &fakeVM{events: []vmm.Event{
		{Seq: 4, Type: vmm.EventLost, Lost: 4}, {Seq: 5, Type: vmm.EventState, State: vmm.StatePaused, Was: vmm.StateRunning},
		{Seq: 6, Type: vmm.EventDiskError, Device: "disk a\nb", Message: "err EIO", More: 3},
		{Seq: 7, Type: vmm.EventRound, Migration: "m", Round: &migrate.RoundStats{N: 2, BytesSent: 4096}},
	}})
	exit, out, _ := c.run("events", "db", "--after", "4")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if exit != 0 || len(lines) != 3 || !strings.Contains(lines[0], "state paused (was running)") || !strings.Contains(lines[1], "and 3 more") || !strings.Contains(lines[2], "4.00 KiB sent") {
		t.Errorf("%d %s", exit, out)
	}
	exit, out, _ = c.run("events", "db", "--json")
	if exit != 0 || strings.Count(out, "\n") != 4 || !strings.Contains(out, `"lost":4`) {
		t.Errorf("%d %s", exit, out)
	}
}
