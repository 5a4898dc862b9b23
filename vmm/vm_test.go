package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/guest"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/vmm/memory"
)

// ran is a VM whose Run is under way.
type ran struct {
	*VM
	con *vmtest.Tape
	out chan Outcome
	err error // valid when out has delivered
}

// run lets a VM run in the background.
func run(t *testing.T, vm *VM, con *vmtest.Tape) *ran {
	t.Helper()
	r := &ran{VM: vm, con: con, out: make(chan Outcome, 1)}
	go func() {
		out, err := vm.Run(context.Background())
		r.err = err
		r.out <- out
	}()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		check(t, vm.Stop(ctx))
	})
	started := func() bool {
		vm.lifeMu.Lock()
		defer vm.lifeMu.Unlock()
		return vm.life != lifeNew
	}
	for !started() { // Stop before that would keep the VM from running
		time.Sleep(100 * time.Microsecond)
	}
	return r
}

// obeying starts a VM whose guest does what is typed, see vmtest.Obey.
func obeying(t *testing.T) *ran {
	t.Helper()
	needKVM(t)
	con := vmtest.NewTape()
	cfg := testConfig(2, vmtest.Obey)
	cfg.Serial, cfg.Log = con, vmtest.Log(t)
	vm, err := NewVM(cfg)
	check(t, err)
	r := run(t, vm, con)
	con.Await(t, "B")
	return r
}

// ends waits for the end of a VM.
func (r *ran) ends(t *testing.T, kind OutcomeKind, text string) {
	t.Helper()
	select {
	case out := <-r.out:
		check(t, r.err)
		if out.Kind != kind || !strings.Contains(out.Text, text) {
			t.Errorf("the VM %v: %s; want %v: %s", out.Kind, out.Text, kind, text)
		}
		if !r.con.Closed() {
			t.Error("the serial backend was not closed")
		}
		r.out <- out
	case <-vmtest.Within(t).Done():
		t.Fatal("the VM does not end")
	}
}

func (r *ran) is(t *testing.T, want State) {
	t.Helper()
	if got := r.Info().State; got != want {
		t.Errorf("the VM is %v, want %v", got, want)
	}
}

func refused(t *testing.T, err error, says string) {
	t.Helper()
	if !errors.Is(err, ErrState) || !strings.Contains(err.Error(), says) {
		t.Errorf("error %v, want ErrState with %q", err, says)
	}
}

func TestVMEnds(t *testing.T) {
	t.Run("power off", func(t *testing.T) {
		vm := obeying(t)
		vm.is(t, StateRunning)
		vm.con.Type("p")
		vm.ends(t, PoweredOff, "the guest powered off")
		vm.is(t, StateStopped)
		refused(t, vm.Pause(t.Context()), "the VM has stopped")
		refused(t, vm.Resume(t.Context(), true), "the VM has stopped")
		_, err := vm.StartMigration("127.0.0.1:1", migrate.Options{})
		refused(t, err, "the VM has stopped")
		check(t, vm.Stop(vmtest.Within(t)))
		_, err = vm.Run(t.Context())
		refused(t, err, "before")
	})
	t.Run("crash", func(t *testing.T) {
		vm := obeying(t)
		vm.con.Type("i")
		vm.ends(t, Crashed, "emulation failure")
	})
	t.Run("stop", func(t *testing.T) {
		vm := obeying(t)
		check(t, vm.Stop(vmtest.Within(t)))
		vm.ends(t, Stopped, "stopped")
		check(t, vm.Stop(vmtest.Within(t)))
	})
	t.Run("stop of a paused one", func(t *testing.T) {
		vm := obeying(t)
		check(t, vm.Pause(t.Context()))
		check(t, vm.Stop(vmtest.Within(t)))
		vm.ends(t, Stopped, "stopped")
	})
	t.Run("context", func(t *testing.T) {
		needKVM(t)
		cfg := testConfig(1, vmtest.JustCount)
		cfg.Serial = vmtest.NewTape()
		vm, err := NewVM(cfg)
		check(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		out, err := vm.Run(ctx)
		if err != nil || out.Kind != Stopped {
			t.Errorf("%+v, %v", out, err)
		}
	})
	t.Run("stop before run", func(t *testing.T) {
		needKVM(t)
		vm, err := NewVM(testConfig(1, vmtest.JustCount))
		check(t, err)
		check(t, vm.Stop(vmtest.Within(t)))
		check(t, vm.Stop(vmtest.Within(t)))
		_, err = vm.Run(t.Context())
		refused(t, err, "stopped")
	})
}

// TestVMReboots: a reset starts the guest again from its kernel, on the same
// serial port.
func TestVMReboots(t *testing.T) {
	vm := obeying(t)
	vm.con.Type("xr")
	vm.con.Await(t, "BxB")
	vm.con.Type("yk")
	vm.con.Await(t, "BxByB")
	vm.is(t, StateRunning)
	check(t, vm.Pause(t.Context()))
	vm.is(t, StatePaused)
	vm.con.Type("z")
	check(t, vm.Resume(t.Context(), false))
	vm.con.Await(t, "BxByBz")
	vm.con.Type("p")
	vm.ends(t, PoweredOff, "")
}

// TestPauseMeetsReset pauses a guest that resets itself all the time: Pause finds a
// machine that runs.
func TestPauseMeetsReset(t *testing.T) {
	needKVM(t)
	cfg := testConfig(1, []byte{0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee}) // out of 6 to port 0xcf9
	cfg.Serial = vmtest.NewTape()
	vm, err := NewVM(cfg)
	check(t, err)
	r := run(t, vm, cfg.Serial.(*vmtest.Tape))
	for range 20 {
		check(t, vm.Pause(t.Context()))
		r.is(t, StatePaused)
		check(t, vm.Resume(t.Context(), false))
	}
	check(t, vm.Stop(vmtest.Within(t)))
	r.ends(t, Stopped, "")
}

func TestVMInfo(t *testing.T) {
	vm := obeying(t)
	i := vm.Info()
	if i.Name != "test" || i.PID != os.Getpid() || i.CPUs != 2 || i.Memory != 16<<20 || i.Address != "" || i.Migration != nil || i.Incoming != nil {
		t.Errorf("info %+v", i)
	}
	if b, err := json.Marshal(i); err != nil || !strings.Contains(string(b), `"devices":{"console":false,"disks":[],"nets":[],"rng":false}`) {
		t.Errorf("JSON of a VM without devices: %s, %v", b, err)
	}
	if b, err := json.Marshal(receiving(t, ReceiveConfig{}).Info()); err != nil || strings.Contains(string(b), "devices") {
		t.Errorf("JSON of a receiver that waits: %s, %v", b, err)
	}
	if vm.Addr() != nil || vm.Migration() != nil {
		t.Error("a VM that was not received has an address, or a migration")
	}
}

func TestConfigDefaults(t *testing.T) {
	c := Config{}.withDefaults()
	if c.Name != "vm" || c.CPUs != 1 || c.Memory != 256<<20 || c.Backing != memory.DefaultBacking || c.Cmdline != guest.DefaultCmdline || len(c.Kernel) != len(guest.ELF) {
		t.Errorf("%+v", c)
	}
	if c := (Config{Cmdline: "fill=1M"}).withDefaults(); c.Cmdline != "fill=1M" {
		t.Error("command line replaced")
	}
	disk := []virtio.Spec{&blk.Spec{Config: blk.Config{Path: "root.img"}}}
	readOnly := []virtio.Spec{&balloon.Spec{}, &blk.Spec{Config: blk.Config{Path: "root.img", ReadOnly: true}}, disk[0]}
	for want, c := range map[string]Config{
		"console=ttyS0":                  {Kernel: []byte{1}},
		"quiet":                          {Kernel: []byte{1}, Cmdline: "quiet", Devices: disk},
		"console=ttyS0 root=/dev/vda rw": {Kernel: []byte{1}, Devices: disk},
		"console=ttyS0 root=/dev/vda ro": {Kernel: []byte{1}, Devices: readOnly},
	} {
		if got := c.withDefaults().Cmdline; got != want {
			t.Errorf("command line %q, want %q", got, want)
		}
	}
	if c := (Config{Kernel: []byte{1}, Initrd: []byte{2}, Devices: disk}).withDefaults(); c.Cmdline != "console=ttyS0" {
		t.Errorf("command line with an initial RAM disk %q", c.Cmdline)
	}
}

// TestNewVMRefuses: NewVM reports a mistake in one line, before it makes anything.
func TestNewVMRefuses(t *testing.T) {
	needKVM(t)
	for says, cfg := range map[string]Config{
		"300 vCPUs":                 {CPUs: 300},
		"kernel: not an ELF file":   {Kernel: []byte("#!/bin/sh\n")},
		"ELF file truncated":        {Kernel: []byte("\x7fELF and nothing more")},
		"memory of 5 bytes":         {Memory: 5},
		"MiB available, of ":        {Memory: memory.MaxSize},
		`name "a b"`:                {Name: "a b"},
		"floppy":                    {Backing: "floppy"},
		"command line of 9999 byte": {Cmdline: strings.Repeat("x", 9999)},
	} {
		if _, err := NewVM(cfg); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("error %v, want %q", err, says)
		}
	}
	ln := listen(t)
	defer ln.Close()
	if _, err := NewReceiver(ReceiveConfig{Listener: ln, Name: "a/b"}); err == nil {
		t.Error("a name with a slash was taken")
	}
	if _, err := NewReceiver(ReceiveConfig{Listener: ln, Backing: "floppy"}); err == nil {
		t.Error("a floppy was taken")
	}
	if _, err := NewReceiver(ReceiveConfig{Listener: ln, Tracking: "no"}); err == nil {
		t.Error("a receiver takes any tracking")
	}
	if _, err := NewReceiver(ReceiveConfig{}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "needs a listener") {
		t.Errorf("without a listener: %v", err)
	}
}
