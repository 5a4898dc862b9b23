package machine

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/console"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/rng"
)

// disk is a spec of a disk.
func disk(path string) *blk.Spec { return &blk.Spec{Config: blk.Config{Path: path}} }

// allDevices is the spec of a machine with each device that needs nothing of
// the network, whose disk is at path.
func allDevices(t *testing.T, path string) Spec {
	t.Helper()
	return testSpec(t, 1, vmtest.Obey, &blk.Spec{Config: blk.Config{Path: path, ID: "d"}}, &console.Spec{}, &rng.Spec{}, &balloon.Spec{})
}

// built is the machine that a destination makes of m.
func built(t *testing.T, m *Machine) *Target {
	t.Helper()
	config, err := m.Source().MigrationConfig()
	check(t, err)
	to, err := (&Builder{AllowSourcePaths: true, Log: vmtest.Log(t)}).BuildTarget(t.Context(), config)
	check(t, err)
	t.Cleanup(func() { check(t, to.Discard()) })
	return to
}

// handOver makes the machine of a destination and loads the state. What is left is to
// unlock the disks here and to lock them there.
func handOver(t *testing.T, m *Machine) (migrate.Source, *Target) {
	t.Helper()
	to := built(t, m)
	src := m.Source()
	_, err := src.PauseForHandoff(vmtest.Within(t))
	check(t, err)
	ram := make([]byte, m.Memory().Size())
	check(t, m.Memory().ReadAt(ram, 0))
	check(t, to.Machine.Memory().WriteAt(ram, 0))
	state, err := src.SaveState(vmtest.Within(t))
	check(t, err)
	check(t, to.PrepareState(state))
	check(t, to.LoadState(vmtest.Within(t), state))
	return src, to
}

func cannotLock(t *testing.T, err error) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), "another process or disk uses it") {
		t.Errorf("error %v, want one of the disk's lock", err)
	}
}

// TestDiskLockMoves: the lock of a disk moves with the right to run. Two machines never
// have it at the same time, and a machine that cannot get it does not run.
func TestDiskLockMoves(t *testing.T) {
	m := fromSpec(t, allDevices(t, vmtest.Image(t, "a.img", 1<<20)), nil)
	check(t, m.Boot())
	check(t, m.Start(false))
	src, to := handOver(t, m)
	cannotLock(t, to.Start(vmtest.Within(t), false)) // the source still has the lock
	check(t, src.ResumeAfterAbort(vmtest.Within(t)))
	if m.Paused() {
		t.Error("the source does not go on")
	}

	src, to = handOver(t, m)
	check(t, src.YieldForHandoff(vmtest.Within(t)))
	check(t, to.Start(vmtest.Within(t), false))
	// The disk is taken: the source stays paused, and a resume tries again.
	cannotLock(t, src.ResumeAfterAbort(vmtest.Within(t)))
	if !m.Paused() {
		t.Error("the source runs without its disk")
	}
	cannotLock(t, m.Resume())
	to.Stop()
	check(t, to.devices.backends.unlock(t.Context()))
	check(t, m.Resume())
	if m.Paused() {
		t.Error("the source stands still, although its disk is free")
	}
	cannotLock(t, to.Acquire())
}

// TestLoadedTwice: a destination that has loaded a state can forget it, as when the source
// undoes its stop, and load another one. Loading writes no guest memory.
func TestLoadedTwice(t *testing.T) {
	con := vmtest.NewTape()
	m := fromSpec(t, allDevices(t, vmtest.Image(t, "a.img", 1<<20)), con)
	check(t, m.Boot())
	check(t, m.Start(false))
	con.Await(t, "B")
	src, to := handOver(t, m)
	for range 2 {
		there := make([]byte, m.Memory().Size())
		here := make([]byte, len(there))
		check(t, m.Memory().ReadAt(here, 0))
		check(t, to.Machine.Memory().ReadAt(there, 0))
		if !bytes.Equal(here, there) {
			t.Error("loading the state has written guest memory")
		}
		check(t, to.UnloadState(t.Context()))
		check(t, to.Machine.Memory().ReadAt(there, 0))
		if !bytes.Equal(here, there) {
			t.Error("guest memory did not stay when the state was unloaded")
		}
		// The guest goes on here for a while.
		check(t, src.ResumeAfterAbort(vmtest.Within(t)))
		check(t, m.SetBalloon(1<<20))
		_, err := src.PauseForHandoff(vmtest.Within(t))
		check(t, err)
		check(t, m.Memory().ReadAt(here, 0))
		check(t, to.Machine.Memory().WriteAt(here, 0))
		state, err := src.SaveState(vmtest.Within(t))
		check(t, err)
		check(t, to.PrepareState(state))
		check(t, to.LoadState(vmtest.Within(t), state))
	}
	check(t, src.YieldForHandoff(vmtest.Within(t)))
	check(t, to.Start(vmtest.Within(t), false))
	if b, err := to.Balloon(t.Context()); err != nil || b.Target != 1<<20 {
		t.Errorf("balloon %+v, %v", b, err)
	}
	check(t, to.Pause(t.Context()))
	check(t, to.Resume())
}

// TestResetKeepsBackends: a reset makes the devices of the next machine from the same
// backends. The disk stays locked, and the host's target for the balloon stays.
func TestResetKeepsBackends(t *testing.T) {
	path := vmtest.Image(t, "a.img", 1<<20)
	con := vmtest.NewTape()
	m := fromSpec(t, allDevices(t, path), con)
	check(t, m.Boot())
	check(t, m.Start(false))
	check(t, m.SetBalloon(1<<20))
	con.Await(t, "B")
	con.Type("r")
	if exit := wait(t, m); exit.Kind != ExitReset {
		t.Fatalf("the guest %v", exit.Kind)
	}
	before := slices.Clone(m.devices.backends.all)
	taken := func() {
		t.Helper()
		other, err := disk(path).Open(vmtest.Log(t))
		check(t, err)
		cannotLock(t, other.(virtio.Locker).Lock())
		check(t, other.Close())
	}
	taken()
	next, err := m.Reset()
	check(t, err)
	defer func() { check(t, next.Close()) }()
	if !slices.Equal(before, next.devices.backends.all) {
		t.Error("a backend was opened again")
	}
	taken()
	check(t, next.Start(false))
	con.Await(t, "BB")
	if b, err := next.Balloon(t.Context()); err != nil || b.Target != 1<<20 {
		t.Errorf("balloon %+v, %v", b, err)
	}
	check(t, next.Close())
	other, err := disk(path).Open(vmtest.Log(t))
	check(t, err)
	check(t, other.(virtio.Locker).Lock())
	check(t, other.Close())
}

// TestAllDevicesRoundTrip: a machine that has loaded a state saves an equal one.
func TestAllDevicesRoundTrip(t *testing.T) {
	m := fromSpec(t, allDevices(t, vmtest.Image(t, "a.img", 1<<20)), nil)
	check(t, m.Boot())
	check(t, m.SetBalloon(1<<20))
	before, err := m.saveState()
	check(t, err)
	to := built(t, m)
	check(t, to.Machine.loadState(before))
	after, err := to.Machine.saveState()
	check(t, err)
	if len(before.Virtio.Devices) != 4 {
		t.Fatalf("%d devices", len(before.Virtio.Devices))
	}
	same(t, "state", still(before), still(after))
}

// TestDestinationNamesAll: the error of a destination names everything that is not
// available there.
func TestDestinationNamesAll(t *testing.T) {
	small, gone := vmtest.Image(t, "small.img", 1<<20), vmtest.Image(t, "gone.img", 1<<20)
	spec := testSpec(t, 1, vmtest.Obey, disk(small), disk(gone))
	m := fromSpec(t, spec, nil)
	config, err := m.Source().MigrationConfig()
	check(t, err)
	check(t, os.Truncate(small, 4096))
	check(t, os.Remove(gone))
	refuses := func(b Builder, says ...string) {
		t.Helper()
		_, err := b.BuildTarget(t.Context(), config)
		for _, s := range says {
			if err == nil || !strings.Contains(err.Error(), s) {
				t.Errorf("error %v, want %q in it", err, s)
			}
		}
	}
	refuses(Builder{AllowSourcePaths: true}, "expected 1048576 bytes as at the source, found 4096", "gone.img")
	other := vmtest.Image(t, "other.img", 1<<20)
	refuses(Builder{Devices: []virtio.Spec{disk(other), &net.Spec{}}},
		"disk: expected 2 as at the source, 1 given", "net: expected 0 as at the source, 1 given")
	if os.Geteuid() == 0 {
		busy, err := net.ParseOptions(fmt.Sprintf("tap=gvbusy%d", os.Getpid()%1e6))
		check(t, err)
		tap, err := net.OpenTap(busy)
		check(t, err)
		defer func() { check(t, tap.Close()) }()
		withNet := spec
		withNet.Devices = append(slices.Clone(spec.Devices), &net.Spec{Options: busy, Features: 1})
		encoded, err := withNet.encode(nil)
		check(t, err)
		_, err = (&Builder{AllowSourcePaths: true}).BuildTarget(t.Context(), encoded)
		for _, s := range []string{"tap " + busy.Tap, "another process uses it", "gone.img"} {
			if err == nil || !strings.Contains(err.Error(), s) {
				t.Errorf("error %v, want %q in it", err, s)
			}
		}
	}
	refuses(Builder{Devices: []virtio.Spec{&blk.Spec{Config: blk.Config{Path: other, ReadOnly: true}}, disk(other)}}, "readonly is the guest's")
	to, err := (&Builder{Devices: []virtio.Spec{disk(vmtest.Image(t, "x.img", 1<<20)), disk(other)}}).BuildTarget(t.Context(), config)
	check(t, err)
	if got := to.spec.Devices[1].(*blk.Spec).Path; got != other {
		t.Errorf("the second disk is %s", got)
	}
	check(t, to.Discard())
}

// announcements counts them.
type announcements int

func (a *announcements) Announce() { *a++ }

// TestTakenBackIsAnnounced: a guest that was given away and is taken back is announced,
// as one that arrives is; one whose stop was undone is not.
func TestTakenBackIsAnnounced(t *testing.T) {
	m := fromSpec(t, testSpec(t, 1, vmtest.JustCount), nil)
	var n announcements
	m.devices.backends.announcers = append(m.devices.backends.announcers, &n)
	check(t, m.Boot())
	check(t, m.Start(false))
	src := m.Source()
	stop := func() {
		t.Helper()
		_, err := src.PauseForHandoff(vmtest.Within(t))
		check(t, err)
	}
	expect := func(want announcements, when string) {
		t.Helper()
		if n != want {
			t.Errorf("%s: announced %d times, want %d", when, n, want)
		}
	}
	expect(0, "started here")
	stop()
	check(t, src.ResumeAfterAbort(vmtest.Within(t)))
	expect(0, "a stop undone")
	stop()
	check(t, src.YieldForHandoff(vmtest.Within(t)))
	expect(0, "given away")
	check(t, src.ResumeAfterAbort(vmtest.Within(t)))
	expect(1, "taken back")
	check(t, m.Pause(vmtest.Within(t)))
	check(t, m.Resume())
	expect(1, "paused and resumed")

	check(t, m.Pause(vmtest.Within(t)))
	stop()
	check(t, src.YieldForHandoff(vmtest.Within(t)))
	check(t, src.ResumeAfterAbort(vmtest.Within(t)))
	expect(1, "taken back, still paused")
	check(t, m.Resume())
	expect(2, "runs again")
}

// TestDisconnect: a machine that is disconnected holds no lock of its disks, and has its
// memory still.
func TestDisconnect(t *testing.T) {
	path := vmtest.Image(t, "a.img", 1<<20)
	m := fromSpec(t, allDevices(t, path), nil)
	check(t, m.Boot())
	check(t, m.Start(false))
	check(t, m.Disconnect())
	other, err := disk(path).Open(vmtest.Log(t))
	check(t, err)
	check(t, other.(virtio.Locker).Lock())
	check(t, other.Close())
	word(t, m, 1<<20)
	check(t, m.Disconnect())
	check(t, m.Close())
}

// TestTheEndInTheStop: a guest that ends in the moment in which it is stopped for its
// handover. A reset is handed over; anything else is said once, and there is nothing to
// resume.
func TestTheEndInTheStop(t *testing.T) {
	for key, kind := range map[string]ExitKind{"p": ExitPowerOff, "i": ExitCrash, "r": ExitReset, "t": ExitReset} {
		con := vmtest.NewTape()
		m := newMachine(t, 2, vmtest.Obey, con)
		check(t, m.Start(false))
		con.Await(t, "B")
		src := m.Source()
		con.Type(key)
		wait(t, m)
		_, err := src.PauseForHandoff(t.Context())
		ended := (*EndedError)(nil)
		if kind == ExitReset {
			check(t, err)
			state, err := src.SaveState(t.Context())
			check(t, err)
			s, err := decodeState(state)
			check(t, err)
			if s.Reset == nil || len(s.VCPUs) != 0 {
				t.Errorf("%s: state %+v", key, s)
			}
			check(t, src.YieldForHandoff(t.Context()))
		} else if !errors.As(err, &ended) || ended.Exit.Kind != kind || isClosed(src.ResetRequested()) {
			t.Errorf("%s: %v", key, err)
		}
		check(t, src.ResumeAfterAbort(t.Context()))
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
