package vmm

import (
	"fmt"
	stdnet "net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
)

// image makes a disk's image.
func image(t *testing.T, name string, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	check(t, os.WriteFile(path, nil, 0o600))
	check(t, os.Truncate(path, size))
	return path
}

// allDevices is the spec of a machine with each device that needs nothing of
// the network, whose disk is at path.
func allDevices(t *testing.T, path string) Spec {
	t.Helper()
	needKVM(t)
	cfg := testConfig(1, obey)
	cfg.Devices = Devices{Balloon: true, RNG: true, Console: true, Disks: []DiskSpec{{Config: blk.Config{Path: path, ID: "d"}}}}
	spec, err := NewSpec(cfg)
	check(t, err)
	return spec
}

// built is the machine that a destination makes of m.
func built(t *testing.T, m *Machine) *target {
	t.Helper()
	config, err := m.Source().MigrationConfig()
	check(t, err)
	to, err := (&Builder{Logf: t.Logf}).build(config)
	check(t, err)
	t.Cleanup(func() { check(t, to.Discard()) })
	return to
}

// handOver brings a machine to where only its disks are still to be given up.
func handOver(t *testing.T, m *Machine) (migrate.Source, *target) {
	t.Helper()
	to := built(t, m)
	src := m.Source()
	_, err := src.PauseForHandoff(within(t))
	check(t, err)
	ram := make([]byte, m.Memory().Size())
	check(t, m.Memory().ReadAt(ram, 0))
	check(t, to.Machine.Memory().WriteAt(ram, 0))
	state, err := src.SaveState(within(t))
	check(t, err)
	check(t, to.PrepareState(state))
	check(t, to.LoadState(within(t), state))
	return src, to
}

func cannotLock(t *testing.T, err error) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), "another process or disk uses it") {
		t.Errorf("error %v, want one of the disk's lock", err)
	}
}

// TestDiskLockMoves with the right to run: at no time are there two that have
// it, and who cannot have it does not run.
func TestDiskLockMoves(t *testing.T) {
	m := fromSpec(t, allDevices(t, image(t, "a.img", 1<<20)), nil)
	check(t, m.Boot())
	check(t, m.Start(false))
	src, to := handOver(t, m)
	cannotLock(t, to.Start(within(t), false)) // the source has not yielded: ABORTED
	check(t, src.ResumeAfterAbort(within(t)))
	if m.Paused() {
		t.Error("the source does not go on")
	}

	src, to = handOver(t, m)
	check(t, src.YieldForHandoff(within(t)))
	check(t, to.Start(within(t), false))
	// The disk is taken: the source stays paused, and a resume tries again.
	cannotLock(t, src.ResumeAfterAbort(within(t)))
	if !m.Paused() {
		t.Error("the source runs without its disk")
	}
	cannotLock(t, m.Resume())
	to.Stop()
	check(t, to.backends.release())
	check(t, m.Resume())
	if m.Paused() {
		t.Error("the source stands still, although its disk is free")
	}
	cannotLock(t, to.backends.acquire())
}

// TestNewVMLocksTheDisk, so that a VM whose disk is another's never seems to
// run; it is free again when the VM has gone, whether that ever ran or not.
func TestNewVMLocksTheDisk(t *testing.T) {
	needKVM(t)
	cfg := testConfig(1, obey)
	cfg.Devices = Devices{Disks: []DiskSpec{{Config: blk.Config{Path: image(t, "a.img", 1<<20)}}}}
	vm, err := NewVM(cfg)
	check(t, err)
	_, err = NewVM(cfg)
	cannotLock(t, err)
	check(t, vm.Stop())
	vm, err = NewVM(cfg)
	check(t, err)
	check(t, vm.Stop())
}

// machineOf is the machine that a VM has now; a reset gives it another.
func machineOf(vm *VM) *Machine {
	vm.lifeMu.Lock()
	defer vm.lifeMu.Unlock()
	return vm.machine
}

// TestResetKeepsTheDisk: nobody can take it in between.
func TestResetKeepsTheDisk(t *testing.T) {
	needKVM(t)
	cfg := testConfig(1, obey)
	path := image(t, "a.img", 1<<20)
	cfg.Devices.Disks = []DiskSpec{{Config: blk.Config{Path: path}}}
	vm := running(t, cfg, "B")
	disk := machineOf(vm.VM).backends.disks[0]
	vm.con.keys("r")
	vm.con.await(t, "BB")
	if machineOf(vm.VM).backends.disks[0] != disk {
		t.Error("the disk was opened again")
	}
	other, err := blk.Open(blk.Config{Path: path}, nil)
	check(t, err)
	cannotLock(t, other.Lock())
	check(t, other.Close())
	if i := vm.Info(); len(i.Devices.Disks) != 1 || i.Devices.Disks[0].Size != 1<<20 || i.Devices.Disks[0].Path != path {
		t.Errorf("%+v", i.Devices)
	}
}

// TestResetKeepsTheTap: it stays the interface that it is, with its settings and
// its place in a bridge, and nobody can take it in between. A tap that was made
// by the VMM would vanish as soon as it is closed.
func TestResetKeepsTheTap(t *testing.T) {
	needKVM(t)
	testenv.NeedRoot(t, "a tap")
	name := fmt.Sprintf("gvreset%d", os.Getpid()%1e6)
	options, err := net.ParseOptions("tap=" + name + ",mac=52:54:00:0a:0b:0c")
	check(t, err)
	cfg := testConfig(1, obey)
	cfg.Devices.Nets = []NetSpec{{Options: options}}
	vm := running(t, cfg, "B")
	device := machineOf(vm.VM).backends.nets[0]
	before, err := stdnet.InterfaceByName(name)
	check(t, err)
	for i := range 3 {
		vm.con.keys("r")
		vm.con.await(t, strings.Repeat("B", i+2))
		if machineOf(vm.VM).backends.nets[0] != device {
			t.Error("the tap was opened again")
		}
		after, err := stdnet.InterfaceByName(name)
		check(t, err)
		if after.Index != before.Index {
			t.Errorf("the tap was interface %d and is %d", before.Index, after.Index)
		}
		if tap, err := net.OpenTap(options); err == nil {
			t.Error("somebody else can have the tap")
			check(t, tap.Close())
		} else if !strings.Contains(err.Error(), "another process has it") {
			t.Error(err)
		}
	}
	if i := vm.Info(); len(i.Devices.Nets) != 1 || i.Devices.Nets[0].Tap != name {
		t.Errorf("the tap is told as %+v", i.Devices.Nets)
	}
	if err := vm.Stop(); err != nil {
		t.Error(err)
	}
	vm.ends(t, Stopped, "")
	if _, err := stdnet.InterfaceByName(name); err == nil {
		t.Error("the tap is left behind")
	}
}

// TestAllDevicesRoundTrip: save, load, save again gives equal bytes.
func TestAllDevicesRoundTrip(t *testing.T) {
	m := fromSpec(t, allDevices(t, image(t, "a.img", 1<<20)), nil)
	check(t, m.Boot())
	check(t, m.balloon.SetTarget(1<<20))
	before, err := m.SaveState()
	check(t, err)
	to := built(t, m)
	check(t, to.Machine.LoadState(before))
	after, err := to.Machine.SaveState()
	check(t, err)
	if len(before.Virtio.Devices) != 4 {
		t.Fatalf("%d devices", len(before.Virtio.Devices))
	}
	same(t, "state", still(before), still(after))
}

// TestDestinationNamesAll that it cannot have, at once.
func TestDestinationNamesAll(t *testing.T) {
	needKVM(t)
	cfg := testConfig(1, obey)
	small, gone := image(t, "small.img", 1<<20), image(t, "gone.img", 1<<20)
	cfg.Devices.Disks = []DiskSpec{{Config: blk.Config{Path: small}}, {Config: blk.Config{Path: gone}}}
	spec, err := NewSpec(cfg)
	check(t, err)
	m := fromSpec(t, spec, nil)
	config, err := m.Source().MigrationConfig()
	check(t, err)
	check(t, os.Truncate(small, 4096))
	check(t, os.Remove(gone))
	refuses := func(b Builder, says ...string) {
		t.Helper()
		_, err := b.build(config)
		for _, s := range says {
			if err == nil || !strings.Contains(err.Error(), s) {
				t.Errorf("error %v, want %q in it", err, s)
			}
		}
	}
	refuses(Builder{}, "it has 4096 bytes, the guest's has 1048576", "gone.img")
	other := image(t, "other.img", 1<<20)
	refuses(Builder{Disks: []blk.Config{{Path: other}}, Nets: []net.Options{{}}}, "the guest has 2 disks, 1 are given", "the guest has 0 network devices, 1 are given")
	if os.Geteuid() == 0 {
		busy, err := net.ParseOptions(fmt.Sprintf("tap=gvbusy%d", os.Getpid()%1e6))
		check(t, err)
		tap, err := net.OpenTap(busy)
		check(t, err)
		defer func() { check(t, tap.Close()) }()
		withNet := spec
		withNet.Devices.Nets = []NetSpec{{Options: busy, Features: 1}}
		encoded, err := withNet.Encode()
		check(t, err)
		_, err = (&Builder{}).build(encoded)
		for _, s := range []string{"tap " + busy.Tap, "another process has it", "gone.img"} {
			if err == nil || !strings.Contains(err.Error(), s) {
				t.Errorf("error %v, want %q in it", err, s)
			}
		}
	}
	refuses(Builder{Disks: []blk.Config{{Path: other, ReadOnly: true}, {Path: other}}}, "readonly is the guest's")
	to, err := (&Builder{Disks: []blk.Config{{Path: image(t, "x.img", 1<<20)}, {Path: other}}}).build(config)
	check(t, err)
	if got := to.spec.Devices.Disks[1].Path; got != other {
		t.Errorf("the second disk is %s", got)
	}
	check(t, to.Discard())
}
