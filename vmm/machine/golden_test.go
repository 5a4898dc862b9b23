package machine

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/guest"
	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/console"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/rng"
	"github.com/govmm/govmm/virtio/vsock"
	"github.com/govmm/govmm/vmm/cpu"
	"github.com/govmm/govmm/vmm/loader/elftest"
)

// writeGolden writes the files of the version that is being developed; those of
// released versions never change.
var writeGolden = flag.Bool("golden.write", false, "write testdata/v0.1.0 anew")

const goldenDiskSize = 1 << 20

// golden are the machines whose spec and state are kept of each version. They have
// a device of every kind.
var golden = map[string]struct {
	memory  uint64
	kernel  []byte
	cmdline string
	ready   string // what the guest has printed when it is saved
	active  int    // devices with a driver
}{
	// No driver: the machine can be started without the memory of the guest.
	"idle": {16 << 20, elftest.Build(elftest.Kernel{Code: vmtest.Obey}), "console=ttyS0", "B", 0},
	// Drivers of balloon, disk and network card.
	"active": {64 << 20, guest.ELF, "fill=4M dirty=1M rate=1000 tick=0.2 disk=256K ip=10.9.0.2", "tick 2 ", 3},
}

// goldenSpec is one of these machines. The disk's image, the tap and the socket are
// those of this host.
func goldenSpec(t *testing.T, name string) Spec {
	t.Helper()
	tap, err := net.ParseOptions("tap,mac=52:54:00:12:34:56")
	testenv.Check(t, err)
	dir := t.TempDir()
	image := filepath.Join(dir, "disk.img")
	testenv.Check(t, os.WriteFile(image, make([]byte, goldenDiskSize), 0o600))
	g := golden[name]
	return Spec{
		Name: "golden", CPUs: 2, Memory: g.memory, Backing: "anonymous", Cmdline: g.cmdline, Kernel: g.kernel,
		Devices: []virtio.Spec{&balloon.Spec{}, &rng.Spec{}, &console.Spec{}, &blk.Spec{Config: blk.Config{Path: image, ID: "golden"}},
			&net.Spec{Options: tap}, &vsock.Spec{Config: vsock.Config{CID: 77, Path: filepath.Join(dir, "vsock")}}},
	}
}

// TestGolden: specs and states of each released version are decoded, built and
// loaded by this one. A host with an older KVM, or a processor that lacks a feature,
// refuses to build the machine; then only decoding is tested.
func TestGolden(t *testing.T) {
	for name := range golden {
		if *writeGolden {
			saveGolden(t, name)
		}
	}
	versions, err := filepath.Glob("testdata/v*")
	testenv.Check(t, err)
	if len(versions) == 0 {
		t.Fatal("no golden files")
	}
	for _, dir := range versions {
		for name := range golden {
			t.Run(filepath.Base(dir)+"/"+name, func(t *testing.T) {
				config, err := os.ReadFile(filepath.Join(dir, name+".spec.cbor"))
				testenv.Check(t, err)
				saved, err := os.ReadFile(filepath.Join(dir, name+".state.cbor"))
				testenv.Check(t, err)
				decodeGolden(t, name, config, saved)
				t.Run("load", func(t *testing.T) { loadGolden(t, name, config, saved) })
			})
		}
	}
}

func decodeGolden(t *testing.T, name string, config, saved []byte) {
	t.Helper()
	spec, err := decodeSpec(config, nil)
	testenv.Check(t, err)
	// Those of v0.1.0: others came later.
	kinds := slices.DeleteFunc(Kinds(), func(k virtio.Kind) bool { return k.Name == blk.SeedKind.Name })
	if len(spec.Devices) != len(kinds) || spec.Name != "golden" || spec.CPUs != 2 {
		t.Errorf("spec of %q with %d vCPUs and devices %v", spec.Name, spec.CPUs, spec.Devices)
	}
	for i, k := range kinds {
		if got := spec.Devices[i].Kind(); got != k.Name {
			t.Errorf("device %d is a %s, want a %s", i, got, k.Name)
		}
	}
	if d := spec.Devices[3].(*blk.Spec); d.Size != goldenDiskSize || d.ID != "golden" {
		t.Errorf("disk %+v", d)
	}
	state, err := decodeState(saved)
	testenv.Check(t, err)
	if len(state.VCPUs) != 2 || state.VCPUs[0].Regs.RIP == 0 || len(state.Virtio.Devices) != len(kinds) {
		t.Errorf("state of %d vCPUs and %d devices, the first vCPU at %#x", len(state.VCPUs), len(state.Virtio.Devices), state.VCPUs[0].Regs.RIP)
	}
	active := 0
	for _, d := range state.Virtio.Devices {
		if d.Active {
			active++
		}
	}
	if active != golden[name].active {
		t.Errorf("%d devices have a driver, want %d", active, golden[name].active)
	}
	// Nothing is lost: what this version writes of it is the same.
	again, err := encodeState(state)
	testenv.Check(t, err)
	if !bytes.Equal(again, saved) {
		t.Errorf("the state has %d bytes when it is encoded again, and had %d", len(again), len(saved))
	}
}

func loadGolden(t *testing.T, name string, config, saved []byte) {
	testenv.NeedKVM(t)
	testenv.NeedRoot(t, "a tap is opened")
	b := Builder{Devices: goldenSpec(t, name).Devices[3:], Log: vmtest.Log(t)}
	target, err := b.BuildTarget(t.Context(), config)
	if err != nil {
		t.Logf("this host cannot run the guest, so only decoding was tested: %v", err)
		return
	}
	defer func() { testenv.Check(t, target.Discard()) }()
	testenv.Check(t, target.Boot()) // there must be something in memory
	testenv.Check(t, target.PrepareState(saved))
	testenv.Check(t, target.LoadState(t.Context(), saved))
	if golden[name].active > 0 {
		return // its drivers' rings are not in memory
	}
	testenv.Check(t, target.Start(t.Context(), false))
	testenv.Check(t, target.Pause(t.Context()))
}

// saveGolden writes the files from a guest that has run and is paused.
func saveGolden(t *testing.T, name string) {
	t.Helper()
	spec, err := goldenSpec(t, name).Complete(cpu.Host)
	testenv.Check(t, err)
	tape := vmtest.NewTape()
	m, err := New(spec, Ends{Serial: tape}, vmtest.Log(t))
	testenv.Check(t, err)
	defer func() { testenv.Check(t, m.Close()) }()
	testenv.Check(t, m.Boot())
	testenv.Check(t, m.Start(false))
	tape.AwaitThat(t, golden[name].ready, func(out string) bool { return strings.Contains(out, golden[name].ready) })
	testenv.Check(t, m.SetBalloon(4<<20))
	testenv.Check(t, m.Pause(t.Context()))
	config, err := m.Source().MigrationConfig()
	testenv.Check(t, err)
	saved, err := m.Source().SaveState(t.Context())
	testenv.Check(t, err)
	base := filepath.Join("testdata", "v0.1.0", name)
	testenv.Check(t, os.MkdirAll(filepath.Dir(base), 0o755))
	testenv.Check(t, os.WriteFile(base+".spec.cbor", config, 0o644))
	testenv.Check(t, os.WriteFile(base+".state.cbor", saved, 0o644))
}
