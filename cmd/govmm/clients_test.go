package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

// running is a command that was started.
type running struct {
	t              *testing.T
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
}

func (p *running) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

func (p *running) wait() (exit int, stdout, stderr string) {
	p.t.Helper()
	kill := time.AfterFunc(time.Minute, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	_ = p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode(), p.stdout.String(), p.stderr.String()
}

func TestPauseResumeStopInfoPS(t *testing.T) {
	c := newCLI(t)
	vm := &fakeVM{}
	c.serve("db", vm)
	for _, tc := range []struct {
		args  string
		state vmm.State
		words string
	}{
		{"pause", vmm.StatePaused, "govmm: db is paused\n"},
		{"resume db --force", vmm.StateRunning, "govmm: db runs\n"},
		{"pause db --json", vmm.StatePaused, ""},
		{"resume --api-socket " + filepath.Join(c.dir, "govmm", "db.sock"), vmm.StateRunning, "govmm: db runs\n"},
		{"pause db --api-socket " + filepath.Join(c.dir, "govmm", "db.sock"), vmm.StatePaused, "govmm: db is paused\n"},
	} {
		exit, stdout, stderr := c.run(strings.Fields(tc.args)...)
		if exit != 0 || stderr != tc.words || vm.Info().State != tc.state {
			t.Errorf("%s: exit %d, %q, state %s", tc.args, exit, stderr, vm.Info().State)
		}
		var info api.Info
		if tc.words == "" && (json.Unmarshal([]byte(stdout), &info) != nil || info.State != tc.state || info.Name != "db") {
			t.Errorf("%s: %q", tc.args, stdout)
		} else if tc.words != "" && stdout != "" {
			t.Errorf("%s: stdout %q", tc.args, stdout)
		}
	}
	if exit, _, stderr := c.run("pause", "other", "--api-socket", filepath.Join(c.dir, "govmm", "db.sock")); exit != exitFailed {
		t.Errorf("a NAME that the socket does not have: %d", exit)
	} else {
		oneLine(t, stderr, `"db"`)
	}
	if exit, stdout, _ := c.run("ps"); exit != 0 || !strings.Contains(stdout, "NAME  STATE   CPUS  MEMORY  PID   MIGRATION\ndb    paused  2     512M    4711  -\n") {
		t.Errorf("ps: %d\n%s", exit, stdout)
	}
	if exit, stdout, _ := c.run("info"); exit != 0 || !strings.Contains(stdout, "512M") || !strings.Contains(stdout, "4711") {
		t.Errorf("info: %d\n%s", exit, stdout)
	}
	var infos []api.Info
	if exit, stdout, _ := c.run("ps", "--json"); exit != 0 || json.Unmarshal([]byte(stdout), &infos) != nil || len(infos) != 1 || infos[0].PID != 4711 {
		t.Errorf("ps --json: %d %s", exit, stdout)
	}
	c.serve("waiting", &fakeVM{info: vmm.Info{State: vmm.StateReceiving}})
	if exit, _, stderr := c.run("pause"); exit != 0 || stderr != "govmm: db is paused\n" {
		t.Errorf("one VM and a receiver, no NAME: %d %s", exit, stderr)
	}
	c.serve("", &fakeVM{})
	exit, _, stderr := c.run("pause")
	if exit != exitFailed {
		t.Errorf("two VMs and no NAME: exit %d", exit)
	}
	oneLine(t, stderr, "db, vm", "NAME")
	if exit, _, stderr := c.run("stop"); exit != exitFailed || !strings.Contains(stderr, "waiting") {
		t.Errorf("stop among three: %d %s", exit, stderr)
	}
	if exit, _, stderr := c.run("stop", "db", "--force"); exit != 0 || stderr != "govmm: db is stopped\n" {
		t.Errorf("stop: %d %s", exit, stderr)
	}
	if exit, stdout, _ := c.run("ps"); exit != 0 || strings.Contains(stdout, "db") {
		t.Errorf("ps after stop: %s", stdout)
	}
}

func TestMigrateOutcomes(t *testing.T) {
	for _, tc := range []struct {
		status, why string
		json        bool
		exit        int
	}{
		{"completed", "", false, exitDone},
		{"completed", "", true, exitDone},
		{"failed", "connect to h:1: no route to host", false, exitFailed},
		{"failed", "connect to h:1: no route to host", true, exitFailed},
		{"cancelled", "migration cancelled", false, exitCancelled},
		{"cancelled", "migration cancelled", true, exitCancelled},
	} {
		c := newCLI(t)
		vm := &fakeVM{mig: newFakeMigration()}
		c.serve("", vm)
		vm.mig.end(tc.status, tc.why)
		args := []string{"migrate", "--to", "h:1"}
		if tc.json {
			args = append(args, "--json")
		}
		exit, stdout, stderr := c.run(args...)
		if exit != tc.exit {
			t.Errorf("%+v: exit %d", tc, exit)
		}
		switch {
		case tc.json:
			checkResult(t, stdout, tc.status)
		case tc.status == "completed":
			if !strings.Contains(stdout, "downtime 12.5 ms") || !strings.Contains(stdout, "ROUND") || !strings.Contains(stdout, "downtime: pause ") {
				t.Errorf("table:\n%s", stdout)
			}
		case stdout != "":
			t.Errorf("%+v: stdout %q", tc, stdout)
		}
		if tc.status == "completed" {
			if stderr != "" {
				t.Errorf("stderr %q", stderr)
			}
			if exit, stdout, _ := c.run("ps"); exit != 0 || strings.Count(stdout, "\n") != 1 {
				t.Errorf("the source is still there:\n%s", stdout)
			}
			continue
		}
		oneLine(t, stderr, "migrate to h:1: ", "the guest goes on here")
	}
}

func TestMigrateFlagsArrive(t *testing.T) {
	c := newCLI(t)
	vm := &fakeVM{mig: newFakeMigration()}
	c.serve("", vm)
	vm.mig.end("completed", "")
	exit, _, stderr := c.run(strings.Fields("migrate vm --to h:1 --downtime-limit 50ms --bandwidth-limit 100M/s --timeout 1m --auto-converge" +
		" --max-rounds 7 --clear-bitmap-shift 6 --channels 3 --compress lz4 --progress none --verify-pages")...)
	want := migrate.DefaultOptions()
	want.DowntimeLimit, want.BandwidthLimit, want.Timeout = 50*time.Millisecond, 100<<20, time.Minute
	want.MaxRounds, want.ClearBitmapShift, want.VerifyPages, want.AutoConverge = 7, 6, true, true
	want.Channels, want.Compression, want.Trigger = 3, migrate.CompressLZ4, "cli"
	if exit != 0 || vm.to != "h:1" || !reflect.DeepEqual(vm.opt, want) {
		t.Errorf("exit %d %s: %q %+v", exit, stderr, vm.to, vm.opt)
	}
}

// Ctrl-C cancels and waits for the end; so does --cancel from elsewhere.
func TestMigrateCancel(t *testing.T) {
	for _, how := range []string{"signal", "other terminal"} {
		c := newCLI(t)
		vm := &fakeVM{mig: newFakeMigration()}
		c.serve("", vm)
		p := c.start("migrate", "--to", "h:1", "--json")
		<-vm.mig.started
		if how == "signal" {
			p.signal(os.Interrupt)
		} else {
			exit, stdout, _ := c.run("migrate", "--cancel", "--json")
			if exit != 0 {
				t.Errorf("migrate --cancel: exit %d", exit)
			}
			checkResult(t, stdout, "cancelled")
		}
		exit, stdout, stderr := p.wait()
		if exit != exitCancelled || !strings.Contains(stderr, "the guest goes on here") {
			t.Errorf("%s: exit %d, %q", how, exit, stderr)
		}
		checkResult(t, stdout, "cancelled")
		exit, _, stderr = c.run("migrate", "--cancel")
		if exit != exitFailed {
			t.Errorf("a second --cancel: exit %d", exit)
		}
		oneLine(t, stderr, "no migration is under way")
	}
}

// A cancel that comes too late says so, and the second Ctrl-C leaves.
func TestMigrateLeave(t *testing.T) {
	c := newCLI(t)
	vm := &fakeVM{mig: newFakeMigration()}
	vm.mig.late = errors.New("too late to cancel")
	c.serve("", vm)
	stderr, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := c.command(t.Context(), "migrate", "--to", "h:1", "--json")
	var stdout bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	<-vm.mig.started
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	n, err := stderr.Read(buf)
	if err != nil || !strings.Contains(string(buf[:n]), "too late to cancel") {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if cmd.ProcessState.ExitCode() != exitUnknown {
		t.Error(cmd.ProcessState)
	}
	checkResult(t, stdout.String(), "failed")
	vm.mig.end("completed", "")
}

func TestMigrateKilledLeavesItRunning(t *testing.T) {
	c := newCLI(t)
	vm := &fakeVM{mig: newFakeMigration()}
	c.serve("", vm)
	p := c.start("migrate", "--to", "h:1")
	<-vm.mig.started
	p.signal(syscall.SIGKILL)
	p.wait()
	select {
	case <-vm.mig.done:
		t.Error("the migration ended with its client")
	default:
	}
	exit, stdout, _ := c.run("ps")
	if exit != 0 || !strings.Contains(stdout, "precopy, to h:1, round 2") {
		t.Errorf("ps: %s", stdout)
	}
	vm.mig.end("completed", "")
}

// A VM that dies, or hangs in handoff-unknown, still gives one JSON object.
func TestFollowWithoutResult(t *testing.T) {
	c := newCLI(t)
	vm := &fakeVM{mig: newFakeMigration()}
	vm.mig.p.Phase = migrate.PhaseHandoffUnknown
	c.serve("", vm)
	client, err := api.Find(t.Context(), filepath.Join(c.dir, "govmm"), "vm")
	if err != nil {
		t.Fatal(err)
	}
	f := follower{client: client, signals: make(chan os.Signal), line: &progressLine{}, patience: time.Millisecond}
	res, err := f.follow(t.Context(), func(ctx context.Context, progress func(migrate.Progress)) (migrate.Result, error) {
		return client.Migrate(ctx, api.MigrateRequest{To: "h:1"}, progress)
	})
	if !errors.Is(err, errHandoffUnknown) || !strings.Contains(err.Error(), "resume --force") || res.Status != "failed" || res.BytesSent != 12345 {
		t.Errorf("%+v, %v", res, err)
	}
	vm.mig.end("failed", "handoff unknown")

	res, err = f.follow(t.Context(), func(_ context.Context, progress func(migrate.Progress)) (migrate.Result, error) {
		progress(migrate.Progress{Phase: migrate.PhasePrecopy, BytesSent: 7})
		return migrate.Result{}, api.ErrLost
	})
	if !errors.Is(err, errDied) || res.Status != "failed" || res.BytesSent != 7 {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestProgressLine(t *testing.T) {
	p := migrate.Progress{Phase: migrate.PhasePrecopy, Round: 3, BytesSent: 512 << 20, RemainingBytes: 64 << 20,
		BandwidthBytes: 1 << 30, DirtyRateBytes: 300 << 20, EstimatedDowntime: 62500 * time.Microsecond}
	const want = "round 3, 512 MiB sent, 64.0 MiB left, 1.00 GiB/s, dirtied 300 MiB/s, downtime ~62.5 ms"
	if got := progressText(p); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	var out bytes.Buffer
	l := &progressLine{out: &out, width: func() int { return 20 }}
	l.draw(p)
	l.draw(p)
	l.clear()
	l.clear()
	if got := out.String(); got != strings.Repeat("\r\x1b[K"+want[:19], 2)+"\r\x1b[K" {
		t.Errorf("%q", got)
	}
}
