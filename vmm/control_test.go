package vmm

import (
	"errors"
	"strings"
	"testing"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
)

// listening is a guest that enables its power button, prints L, and powers off
// when that is pressed.
var listening = []byte{
	0x66, 0xba, 0x02, 0x06, // mov $0x602,%dx
	0x66, 0xb8, 0x00, 0x01, // mov $0x100,%ax
	0x66, 0xef, // out %ax,(%dx)
	0x66, 0xba, 0xf8, 0x03, // mov $0x3f8,%dx
	0xb0, 'L', // mov $'L',%al
	0xee,                   // out %al,(%dx)
	0x66, 0xba, 0x00, 0x06, // 11: mov $0x600,%dx
	0x66, 0xed, // in (%dx),%ax
	0xf6, 0xc4, 0x01, // test $1,%ah
	0x74, 0xf5, // je 11
	0x66, 0xba, 0x04, 0x06, // mov $0x604,%dx
	0x66, 0xb8, 0x00, 0x20, // mov $0x2000,%ax
	0x66, 0xef, // out %ax,(%dx)
}

// panicking reports a panic and goes on as vmtest.Obey.
var panicking = append([]byte{
	0x66, 0xba, 0x05, 0x05, // mov $0x505,%dx
	0xb0, 0x01, // mov $1,%al
	0xee, // out %al,(%dx)
}, vmtest.Obey...)

// running starts a VM whose guest prints word when it runs.
func running(t *testing.T, cfg Config, word string) *ran {
	t.Helper()
	needKVM(t)
	con := vmtest.NewTape()
	cfg.Serial = con
	if cfg.Log == nil {
		cfg.Log = vmtest.Log(t)
	}
	vm, err := NewVM(cfg)
	check(t, err)
	r := run(t, vm, con)
	con.Await(t, word)
	return r
}

func TestPowerOff(t *testing.T) {
	t.Run("heard", func(t *testing.T) {
		vm := running(t, testConfig(1, listening), "L")
		select {
		case <-vm.Ended():
			t.Error("the VM has ended")
		default:
		}
		check(t, vm.PowerOff(t.Context()))
		<-vm.Ended()
		vm.is(t, StateStopped)
		vm.ends(t, PoweredOff, "the guest powered off")
		refused(t, vm.PowerOff(t.Context()), "the VM has stopped")
	})
	t.Run("not heard", func(t *testing.T) {
		vm := obeying(t)
		refused(t, vm.PowerOff(t.Context()), "does not listen to its power button")
		vm.con.Type("x")
		vm.con.Await(t, "Bx")
	})
	t.Run("paused", func(t *testing.T) {
		vm := running(t, testConfig(1, listening), "L")
		check(t, vm.Pause(t.Context()))
		refused(t, vm.PowerOff(t.Context()), "paused")
		check(t, vm.Resume(t.Context(), false))
		check(t, vm.PowerOff(t.Context()))
		vm.ends(t, PoweredOff, "")
	})
	t.Run("moved", func(t *testing.T) { // the state of the button travels
		vm := running(t, testConfig(1, listening), "L")
		next := receiving(t, ReceiveConfig{})
		if r := vm.migrateTo(t, next.Addr().String()); r.Status != "completed" {
			t.Fatalf("%+v", r)
		}
		vm.ends(t, Migrated, "")
		refused(t, vm.PowerOff(t.Context()), "moved away")
		check(t, next.PowerOff(t.Context()))
		next.ends(t, PoweredOff, "")
	})
	t.Run("during a migration", func(t *testing.T) {
		vm := running(t, testConfig(1, listening), "L")
		m, err := vm.StartMigration(stuck(t), migrate.Options{})
		check(t, err)
		check(t, vm.PowerOff(t.Context()))
		vm.ends(t, PoweredOff, "")
		if r := result(t, m); r.Status != "failed" || !strings.Contains(r.Error, "the guest powered off") {
			t.Errorf("%+v", r)
		}
	})
	t.Run("handed over", func(t *testing.T) {
		src, dst, m, p := unknownHandoff(t)
		refused(t, src.PowerOff(t.Context()), "just being handed over")
		refused(t, src.SetBalloon(t.Context(), 0), "no balloon")
		refused(t, dst.PowerOff(t.Context()), "does not listen")
		p.set(false)
		result(t, m)
	})
	t.Run("nobody there", func(t *testing.T) {
		next := receiving(t, ReceiveConfig{})
		check(t, next.PowerOff(t.Context()))
		next.ends(t, Stopped, "no guest has arrived")
	})
}

// TestNoGuestArrivesAtAnEnd: PowerOff of a receiver fails while a guest starts there,
// and no guest starts after it.
func TestNoGuestArrivesAtAnEnd(t *testing.T) {
	vm := newVM("vm", nil, nil, nil)
	vm.life = lifeRunning
	check(t, vm.arrive())
	refused(t, vm.PowerOff(t.Context()), "a guest is arriving")
	vm.arrived()
	close(vm.ended) // in the place of Run
	check(t, vm.PowerOff(t.Context()))
	refused(t, vm.arrive(), "being stopped")
}

// TestPanicked: that the guest has reported a panic is part of the VM's state, travels,
// and is part of the outcome.
func TestPanicked(t *testing.T) {
	logged := make(chan string, 64)
	cfg := testConfig(1, panicking)
	cfg.Log = vmtest.LogTo(logged)
	vm := running(t, cfg, "B")
	vm.is(t, StatePanicked)
	if i := vm.Info(); !i.Panicked {
		t.Errorf("%+v", i)
	}
	if line := <-logged; !strings.Contains(line, "has panicked") {
		t.Errorf("logged %q", line)
	}
	check(t, vm.Pause(t.Context()))
	vm.is(t, StatePaused)
	if !vm.Info().Panicked {
		t.Error("a pause hides the panic")
	}
	check(t, vm.Resume(t.Context(), false))
	vm.con.Type("r")
	if line := <-logged; !strings.Contains(line, "starts again") {
		t.Errorf("logged %q at the reset", line)
	}
	vm.con.Await(t, "BB")
	next := receiving(t, ReceiveConfig{})
	if r := vm.migrateTo(t, next.Addr().String()); r.Status != "completed" {
		t.Fatalf("%+v", r)
	}
	next.is(t, StatePanicked)
	next.con.Type("p")
	next.ends(t, PoweredOff, "the guest powered off after its kernel had panicked")
}

func TestSetBalloon(t *testing.T) {
	cfg := testConfig(1, vmtest.Obey)
	cfg.Devices = []virtio.Spec{&balloon.Spec{}}
	vm := running(t, cfg, "B")
	is := func(vm *ran, target uint64) {
		t.Helper()
		b, err := vm.Balloon(t.Context())
		if err != nil || b.Target != target || b.Actual != 0 || b.Stats != nil {
			t.Errorf("%+v, %v; want a target of %d", b, err, target)
		}
		if i := vm.Info(); i.Devices.Of("balloon") == nil || i.Devices.Of("balloon").(*balloon.Info).Target != target {
			t.Errorf("info %+v", i.Devices)
		}
	}
	is(vm, 0)
	check(t, vm.SetBalloon(t.Context(), 4<<20))
	is(vm, 4<<20)
	for _, bytes := range []uint64{1, 16 << 20, 1 << 60, ^uint64(0)} {
		if err := vm.SetBalloon(t.Context(), bytes); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d bytes: %v", bytes, err)
		}
	}
	is(vm, 4<<20)
	vm.con.Type("r")
	vm.con.Await(t, "BB")
	is(vm, 4<<20) // the target outlives the reset
	check(t, vm.Pause(t.Context()))
	check(t, vm.SetBalloon(t.Context(), 2<<20))
	is(vm, 2<<20)
	check(t, vm.Resume(t.Context(), false))
	next := receiving(t, ReceiveConfig{})
	if _, err := next.Balloon(t.Context()); !errors.Is(err, ErrState) {
		t.Errorf("without a guest: %v", err)
	}
	refused(t, next.SetBalloon(t.Context(), 0), "no guest has arrived")
	if r := vm.migrateTo(t, next.Addr().String()); r.Status != "completed" {
		t.Fatalf("%+v", r)
	}
	is(next, 2<<20)
	vm.ends(t, Migrated, "")
	refused(t, vm.SetBalloon(t.Context(), 0), "moved away")

	bare := obeying(t)
	refused(t, bare.SetBalloon(t.Context(), 0), "no balloon")
	_, err := bare.Balloon(t.Context())
	refused(t, err, "no balloon")
}

// TestBalloonDuringHandoff: during a handoff a new target is refused, because the
// destination would not learn of it.
func TestBalloonDuringHandoff(t *testing.T) {
	cfg := testConfig(1, vmtest.Obey)
	cfg.Devices = []virtio.Spec{&balloon.Spec{}}
	vm := running(t, cfg, "B")
	s := vm.machine.Source()
	ran, err := s.PauseForHandoff(vmtest.Within(t))
	check(t, err)
	if !ran {
		t.Error("PauseForHandoff says that the guest did not run")
	}
	refused(t, vm.SetBalloon(t.Context(), 4096), "just being handed over")
	refused(t, vm.PowerOff(t.Context()), "just being handed over")
	b, err := vm.Balloon(t.Context())
	if err != nil || b.Target != 0 {
		t.Errorf("%+v, %v", b, err)
	}
	check(t, s.ResumeAfterAbort(vmtest.Within(t)))
	check(t, vm.SetBalloon(t.Context(), 4096))
	vm.con.Type("x")
	vm.con.Await(t, "Bx")
}
