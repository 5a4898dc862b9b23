package main

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/govmm/govmm/internal/boundedlog"
	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/api"
)

// hanging names what a device does not return from, in a govmm that a test has started.
const hanging = "GOVMM_TEST_HANGING"

// addHanging gives every machine of this process a device that hangs.
func addHanging() {
	if in := os.Getenv(hanging); in != "" {
		beside.kinds = []virtio.Kind{{Name: "hanging", New: func() virtio.Spec { return new(hangingSpec) }, About: "hangs"}}
		beside.devices = []virtio.Spec{&hangingSpec{in}}
	}
}

type hangingSpec struct {
	In string `cbor:"in"`
}

func (s *hangingSpec) Kind() string                              { return "hanging" }
func (s *hangingSpec) String() string                            { return "hanging device" }
func (s *hangingSpec) Validate() error                           { return nil }
func (s *hangingSpec) Open(*slog.Logger) (virtio.Backend, error) { return &hangingBackend{s.In}, nil }

// hangingBackend is the device, too.
type hangingBackend struct{ in string }

func (b *hangingBackend) hang(in string) {
	if b.in == in {
		select {}
	}
}

func (b *hangingBackend) Attach(virtio.Guest) (virtio.Device, error) { return b, nil }
func (b *hangingBackend) Info() virtio.Info                          { return nil }
func (b *hangingBackend) Close() error                               { b.hang("close"); return nil }

func (b *hangingBackend) ID() uint16                                              { return 63 }
func (b *hangingBackend) Features() uint64                                        { return 0 }
func (b *hangingBackend) QueueSizes() []uint16                                    { return []uint16{8} }
func (b *hangingBackend) ReadConfig(uint32, []byte)                               {}
func (b *hangingBackend) WriteConfig(uint32, []byte)                              {}
func (b *hangingBackend) Activate(uint64, []*virtio.Queue, virtio.Notifier) error { return nil }
func (b *hangingBackend) Reset()                                                  { b.hang("reset") }
func (b *hangingBackend) ResetQueue(*virtio.Queue)                                {}
func (b *hangingBackend) Pause(context.Context) error                             { b.hang("pause"); return nil }
func (b *hangingBackend) Resume() error                                           { return nil }
func (b *hangingBackend) SaveState() ([]byte, error)                              { return nil, nil }
func (b *hangingBackend) LoadState([]byte) error                                  { return nil }

// resetting resets the first device, and does nothing more.
var resetting = vmtest.Kernel([]byte{
	0x66, 0xba, 0xf8, 0x03, // mov $0x3f8,%dx
	0xb0, '!', // mov $'!',%al
	0xee,                               // out %al,(%dx)
	0x8b, 0x1d, 0x10, 0x80, 0x00, 0xe0, // mov 0xe0008010,%ebx: BAR 0 in slot 1
	0x80, 0xe3, 0xf0, // and $0xf0,%bl
	0xc6, 0x43, 0x14, 0x00, // movb $0,0x14(%ebx)
	0xf4, // hlt
})

// hangs are ways to hang, and what is said of them.
var hangs = []struct{ in, kernel, says string }{
	{"close", "", "hanging device: its end, on this host"},
	{"reset", "", "hanging device: the requests that it has begun"},
	{"reset", "resetting", "hanging device: an access of vCPU 0 to its register at 0x"},
}

// startHanging starts a govmm with a device that hangs.
func (c *cli) startHanging(in, kernel string) *terminal {
	c.t.Helper()
	args := []string{"run", "--memory", "32M", "--balloon=false", "--rng=false"}
	await := "tick 1 "
	if kernel != "" {
		path := filepath.Join(c.dir, "kernel")
		testenv.Check(c.t, os.WriteFile(path, resetting, 0o600))
		args, await = append(args, "--kernel", path), "!"
	} else {
		args = append(args, "--cmdline", "tick=1")
	}
	c.env = []string{hanging + "=" + in}
	tm := c.open(args...)
	tm.await(await)
	return tm
}

// TestForceEndsWhateverHangs: stop --force and a second signal end the process of a VM of
// which a device does not return; both say which. The terminal is as it was, and the name
// is free.
func TestForceEndsWhateverHangs(t *testing.T) {
	testenv.NeedKVM(t)
	for _, h := range hangs {
		t.Run(h.in+" "+h.kernel, func(t *testing.T) {
			t.Run("stop", func(t *testing.T) {
				c := newCLI(t)
				tm := c.startHanging(h.in, h.kernel)
				exit, _, stderr := c.run("stop", "--force")
				if exit != exitFailed || !strings.Contains(stderr, "is ended by force; it waits for "+h.says) {
					t.Errorf("stop: exit status %d: %s", exit, stderr)
				}
				tm.forced(h.says)
			})
			t.Run("two signals", func(t *testing.T) {
				c := newCLI(t)
				tm := c.startHanging(h.in, h.kernel)
				for range 2 {
					testenv.Check(t, tm.cmd.Process.Signal(syscall.SIGTERM))
				}
				tm.forced(h.says)
			})
		})
	}
}

// forced expects the end by force.
func (tm *terminal) forced(says string) {
	tm.t.Helper()
	tm.await("is ended by force; it waits for " + says)
	tm.awaitRaw(false)
	tm.ended(exitFailed)
}

// TestForceWhileAPauseHangs: a device that does not come to rest holds up pause, and not the
// end.
func TestForceWhileAPauseHangs(t *testing.T) {
	testenv.NeedKVM(t)
	c := newCLI(t)
	tm := c.startHanging("pause", "")
	pause := c.command(t.Context(), "pause")
	testenv.Check(t, pause.Start())
	defer func() { _ = pause.Wait() }()
	if exit, _, stderr := c.run("stop", "--force"); exit != exitDone {
		t.Errorf("stop: exit status %d: %s", exit, stderr)
	}
	tm.ended(exitDone)
}

// awaiting is a VM whose end waits for something.
type awaiting struct {
	what    string
	freeing bool
	silent  chan struct{} // nil, or Awaits returns when it is closed
}

func (a *awaiting) Stopping() <-chan struct{} { return nil }
func (a *awaiting) Awaits() (string, bool) {
	if a.silent != nil {
		<-a.silent
	}
	return a.what, a.freeing
}

// TestEndByForce: memory that is still being freed is no failure; a VM that cannot even say
// what it waits for ends; whoever waits for a request hears why; the name is free.
func TestEndByForce(t *testing.T) {
	silent := make(chan struct{})
	defer close(silent)
	for _, tc := range []struct {
		vm     *awaiting
		status int
		says   string
	}{
		{&awaiting{what: "guest memory", freeing: true}, exitDone, "govmm: a: stopped\n"},
		{&awaiting{what: "disk a.img"}, exitFailed, "govmm: a did not end within 4s, and is ended by force; it waits for disk a.img\n"},
		{&awaiting{silent: silent}, exitFailed, "it waits for something that cannot be told\n"},
	} {
		socket := filepath.Join(t.TempDir(), "s")
		claim, err := api.ClaimSocket(socket, "a")
		testenv.Check(t, err)
		var out bytes.Buffer
		p := &process{claim: claim, log: newLog(&out)}
		status := p.endByForce(tc.vm, api.NewServer(&fakeVM{}, socket))
		boundedlog.Flush(t.Context(), p.log) // also where it took longer
		if status != tc.status || !strings.HasSuffix(out.String(), tc.says) {
			t.Errorf("exit status %d: %q", status, out.String())
		}
		claim.Release() // which is done, or is being done
		again, err := api.ClaimSocket(socket, "a")
		testenv.Check(t, err)
		again.Release()
	}
}
