package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/console"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/rng"
	"github.com/govmm/govmm/virtio/vsock"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/pflag"
)

func equipped() *fakeVM {
	free, faults := uint64(100<<20), uint64(7)
	return &fakeVM{info: vmm.Info{State: vmm.StateRunning, PID: 4711, CPUs: 2, Memory: 512 << 20, Kernel: "bzImage", Devices: vmm.Devices{
		{Kind: balloon.Kind, Info: &balloon.Info{Target: 64 << 20, Actual: 32 << 20, Stats: &balloon.Stats{At: time.Now(), Free: &free, MajorFaults: &faults}}},
		{Kind: rng.Kind}, {Kind: console.Kind},
		{Kind: blk.Kind, Info: &blk.Info{Path: "/srv/root.img", Size: 1 << 30, ReadOnly: true, Queues: 1, ReadBytes: 5 << 20}},
		{Kind: net.Kind, Info: &net.Info{MAC: "52:54:00:01:02:03", Tap: "tap7", Bridge: "br0", Queues: 1, RxFrames: 3, TxFrames: 4, TxBytes: 2048}},
		{Kind: vsock.Kind, Info: &vsock.Info{CID: 5, Path: "/run/v.sock"}},
		{Kind: virtio.Kind{Name: "toy"}, Info: toy{}},
	}}}
}

// toy is of a kind that this command does not know: of another program's VM.
type toy struct{ Colour string }

func (toy) Lines() []string { return []string{"red"} }

func TestBalloonCommand(t *testing.T) {
	c := newCLI(t)
	c.serve("web", equipped())
	exit, stdout, stderr := c.run("balloon")
	if exit != exitDone || stderr != "" {
		t.Errorf("balloon: %d %s", exit, stderr)
	}
	for _, want := range []string{"target        64.0 MiB\n", "actual        32.0 MiB\n", "free          100 MiB\n", "major faults  7\n"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("no %q in\n%s", want, stdout)
		}
	}
	var b balloon.Info
	if exit, stdout, _ := c.run("balloon", "web", "--target", "128M", "--json"); exit != exitDone || json.Unmarshal([]byte(stdout), &b) != nil || b.Target != 128<<20 {
		t.Errorf("--target 128M: %d %s", exit, stdout)
	}
	if exit, stdout, _ := c.run("balloon", "web", "--target", "0"); exit != exitDone || !strings.Contains(stdout, "target        0 B\n") {
		t.Errorf("--target 0: %d %s", exit, stdout)
	}
	if exit, _, stderr := c.run("balloon", "web", "--target", "much"); exit != exitUsage {
		t.Errorf("--target much: %d", exit)
	} else {
		oneLine(t, stderr, "--target", "512M")
	}
	c.serve("bare", &fakeVM{})
	for _, args := range [][]string{{"balloon", "bare"}, {"balloon", "bare", "--target", "1M"}} {
		exit, stdout, stderr := c.run(args...)
		if exit != exitFailed || stdout != "" {
			t.Errorf("%v: %d %s", args, exit, stdout)
		}
		oneLine(t, stderr, "no balloon", "govmm run --balloon")
	}
}

func TestInfoOfDevices(t *testing.T) {
	c := newCLI(t)
	vm := equipped()
	vm.info.Panicked, vm.info.State = true, vmm.StatePaused
	c.serve("web", vm)
	exit, stdout, _ := c.run("info", "web")
	if exit != exitDone {
		t.Fatalf("exit %d", exit)
	}
	for _, want := range []string{"has panicked", "bzImage", "balloon     target 64.0 MiB, holds 32.0 MiB\n            the guest: free", "free 100 MiB, major faults 7", "rng         entropy device\n", "console     hvc0\n", "cid 5, /run/v.sock",
		"/srv/root.img, 1.00 GiB, read-only\n", "read 5.00 MiB", "52:54:00:01:02:03, tap tap7, bridge br0\n", "received 3 frames (0 B), sent 4 (2.00 KiB)"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("no %q in\n%s", want, stdout)
		}
	}
	var info api.Info
	if exit, stdout, _ := c.run("info", "web", "--json"); exit != exitDone || json.Unmarshal([]byte(stdout), &info) != nil ||
		info.Devices.Of("disk") == nil ||
		info.Devices.Of("net").(*net.Info).Tap != "tap7" || !info.Panicked || *info.Devices.Of("balloon").(*balloon.Info).Stats.Free != 100<<20 {
		t.Errorf("info --json: %d %s", exit, stdout)
	}
}

// stop asks, waits, and says what came of it.
func TestStopAsks(t *testing.T) {
	c := newCLI(t)
	c.serve("polite", &fakeVM{obeys: vmm.StateStopped})
	if exit, _, stderr := c.run("stop", "polite"); exit != exitDone || stderr != "govmm: polite is stopped\n" {
		t.Errorf("a guest that powers off: %d %s", exit, stderr)
	}
	c.serve("moving", &fakeVM{obeys: vmm.StateMigrated})
	c.serve("deaf", &fakeVM{deaf: fmt.Errorf("%w: does not listen", vmm.ErrState)})
	c.serve("stubborn", &fakeVM{})
	for name, words := range map[string][]string{
		"moving":   {"moved away"},
		"deaf":     {"does not listen", "--force"},
		"stubborn": {"not powered off within 20ms", "may still", "--force"},
	} {
		exit, stdout, stderr := c.run("stop", name, "--timeout", "20ms")
		if exit != exitFailed || stdout != "" {
			t.Errorf("stop %s: %d %s", name, exit, stdout)
		}
		oneLine(t, stderr, append(words, "stop "+name)...)
	}
	c.serve("moving2", &fakeVM{obeys: vmm.StateMigrated})
	if exit, _, stderr := c.run("stop", "moving2", "--then-force", "--timeout", "20ms"); exit != exitFailed || !strings.Contains(stderr, "moved away") {
		t.Errorf("stop moving2 --then-force: %d %s", exit, stderr)
	}
	for name, why := range map[string]string{"deaf": "does not listen", "stubborn": "not powered off within 20ms"} {
		c.serve(name+"2", &fakeVM{deaf: map[string]error{"deaf": fmt.Errorf("%w: does not listen", vmm.ErrState)}[name]})
		exit, _, stderr := c.run("stop", name+"2", "--then-force", "--timeout", "20ms")
		if lines := strings.SplitAfter(stderr, "\n"); exit != exitDone || len(lines) != 3 || !strings.Contains(lines[0], why) ||
			!strings.HasSuffix(lines[0], "; it is ended now\n") || strings.Contains(lines[0], "--force") || lines[1] != "govmm: "+name+"2 is stopped\n" {
			t.Errorf("stop %s2 --then-force: %d %s", name, exit, stderr)
		}
	}
	if exit, _, _ := c.run("stop", "polite", "--force", "--then-force"); exit != exitUsage {
		t.Errorf("--force and --then-force: exit %d", exit)
	}
	for _, name := range []string{"deaf", "stubborn"} {
		if exit, _, stderr := c.run("stop", name, "--force"); exit != exitDone || stderr != "govmm: "+name+" is stopped\n" {
			t.Errorf("stop %s --force: %d %s", name, exit, stderr)
		}
	}
	if exit, _, _ := c.run("stop", "x", "--timeout", "0"); exit != exitUsage {
		t.Errorf("--timeout 0: exit %d", exit)
	}
}

// button is a VM's power button.
type button struct {
	presses chan struct{}
	answer  error
}

func (b *button) PowerOff(context.Context) error {
	b.presses <- struct{}{}
	return b.answer
}

// Ended is nil: the VM goes on.
func (b *button) Ended() <-chan struct{} { return nil }

// The first signal asks the guest, the second does not; nor does the first if
// nobody listens.
func TestSignals(t *testing.T) {
	signal := func() {
		if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	within, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ended := func(ctx context.Context) {
		t.Helper()
		select {
		case <-ctx.Done():
		case <-within.Done():
			t.Error("the context has not ended")
		}
	}
	asked := make(chan string, 1)
	say := func(format string, args ...any) { asked <- fmt.Sprintf(format, args...) }

	listens := &button{presses: make(chan struct{}, 2)}
	ctx, watching, stop := onSignals(t.Context(), listens, say)
	<-watching
	signal()
	<-listens.presses
	if line := <-asked; !strings.Contains(line, "terminated") || !strings.Contains(line, "second") {
		t.Error(line)
	}
	if ctx.Err() != nil {
		t.Error("the first signal ended it")
	}
	signal()
	ended(ctx)
	stop()

	deaf := &button{presses: make(chan struct{}, 2), answer: vmm.ErrState}
	ctx, watching, stop = onSignals(t.Context(), deaf, say)
	<-watching
	signal()
	ended(ctx)
	stop()
	ctx, watching, stop = onSignals(t.Context(), deaf, say)
	<-watching
	stop()
	ended(ctx)
	if len(deaf.presses) != 1 || len(listens.presses) != 0 {
		t.Error("the button was pressed at the wrong time")
	}
}

// The flags of run and receive are those of the table of kinds.
func TestDeviceFlags(t *testing.T) {
	for _, tc := range []struct {
		name     string
		register func(*deviceFlags, *pflag.FlagSet)
		args     string
		want     string // the kinds of the devices, and the text of the disks and sockets
		err      string
	}{
		{"run", (*deviceFlags).registerRun, "", "balloon, rng", ""},
		{"run", (*deviceFlags).registerRun, "--balloon=false --rng=false", "", ""},
		{"run", (*deviceFlags).registerRun, "--disk path=a --vsock path=c,cid=5 --disk path=b,readonly --net tap=t --rng=false",
			"balloon, disk a, disk b, net, vsock cid 5", ""},
		{"run", (*deviceFlags).registerRun, "--disk path=a --disk size=5", "", "size"},
		{"receive", (*deviceFlags).registerReceive, "", "", ""},
		{"receive", (*deviceFlags).registerReceive, "--disk path=a --net tap=t --vsock path=c", "disk a, net, vsock cid 3", ""},
		{"receive", (*deviceFlags).registerReceive, "--net tap=t,mtu=1400", "", "mtu"},
		{"receive", (*deviceFlags).registerReceive, "--balloon=false", "", "unknown flag"},
		{"receive", (*deviceFlags).registerReceive, "--console x", "", "unknown flag"},
	} {
		var f deviceFlags
		flags := pflag.NewFlagSet(tc.name, pflag.ContinueOnError)
		tc.register(&f, flags)
		err := flags.Parse(strings.Fields(tc.args))
		var specs []virtio.Spec
		if err == nil {
			specs, err = f.devices()
		}
		var got []string
		for _, s := range specs {
			text := s.String()
			if s.Kind() == "net" {
				text = "net" // and a MAC address by chance
			}
			got = append(got, text)
		}
		if text := strings.Join(got, ", "); text != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s %s: %s, %v", tc.name, tc.args, text, err)
		}
	}
}

// A guest that may run elsewhere is resumed by force only, and the error says how.
func TestResumeElsewhere(t *testing.T) {
	c := newCLI(t)
	c.serve("web", &fakeVM{elsewhere: true})
	exit, stdout, stderr := c.run("resume", "web")
	if exit != exitFailed || stdout != "" {
		t.Errorf("%d %s", exit, stdout)
	}
	oneLine(t, stderr, "may run elsewhere", "h:1", "govmm resume --force", "twice")
	if exit, _, stderr := c.run("resume", "web", "--force"); exit != exitDone {
		t.Errorf("--force: %d %s", exit, stderr)
	}
}
