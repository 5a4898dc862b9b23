package machine

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/govmm/govmm/balloon"
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

// goldenSpec is a machine with a device of every kind. The disk's image, the tap
// and the socket are those of this host.
func goldenSpec(t *testing.T) Spec {
	t.Helper()
	tap, err := net.ParseOptions("tap,mac=52:54:00:12:34:56")
	testenv.Check(t, err)
	dir := t.TempDir()
	image := filepath.Join(dir, "disk.img")
	testenv.Check(t, os.WriteFile(image, make([]byte, goldenDiskSize), 0o600))
	return Spec{
		Name: "golden", CPUs: 2, Memory: 16 << 20, Backing: "anonymous", Cmdline: "console=ttyS0",
		Kernel: elftest.Build(elftest.Kernel{Code: vmtest.Obey}),
		Devices: []virtio.Spec{&balloon.Spec{}, &rng.Spec{}, &console.Spec{}, &blk.Spec{Config: blk.Config{Path: image, ID: "golden"}},
			&net.Spec{Options: tap}, &vsock.Spec{Config: vsock.Config{CID: 77, Path: filepath.Join(dir, "vsock")}}},
	}
}

// TestGolden: specs and states of each released version are decoded, built and
// loaded by this one. A host with an older KVM, or another vendor's processor,
// refuses to build the machine; then only decoding is tested.
func TestGolden(t *testing.T) {
	if *writeGolden {
		saveGolden(t, "testdata/v0.1.0")
	}
	versions, err := filepath.Glob("testdata/v*")
	testenv.Check(t, err)
	if len(versions) == 0 {
		t.Fatal("no golden files")
	}
	for _, dir := range versions {
		t.Run(filepath.Base(dir), func(t *testing.T) {
			config, err := os.ReadFile(filepath.Join(dir, "spec.cbor"))
			testenv.Check(t, err)
			saved, err := os.ReadFile(filepath.Join(dir, "state.cbor"))
			testenv.Check(t, err)
			decodeGolden(t, config, saved)
			t.Run("load", func(t *testing.T) { loadGolden(t, config, saved) })
		})
	}
}

func decodeGolden(t *testing.T, config, saved []byte) {
	t.Helper()
	spec, err := decodeSpec(config, nil)
	testenv.Check(t, err)
	if len(spec.Devices) != len(Kinds()) || spec.Name != "golden" || spec.CPUs != 2 {
		t.Errorf("spec of %q with %d vCPUs and devices %v", spec.Name, spec.CPUs, spec.Devices)
	}
	for i, k := range Kinds() {
		if got := spec.Devices[i].Kind(); got != k.Name {
			t.Errorf("device %d is a %s, want a %s", i, got, k.Name)
		}
	}
	if d := spec.Devices[3].(*blk.Spec); d.Size != goldenDiskSize || d.ID != "golden" {
		t.Errorf("disk %+v", d)
	}
	state, err := decodeState(saved)
	testenv.Check(t, err)
	if len(state.VCPUs) != 2 || state.VCPUs[0].Regs.RIP == 0 || len(state.Virtio.Devices) != len(Kinds()) {
		t.Errorf("state of %d vCPUs and %d devices, the first vCPU at %#x", len(state.VCPUs), len(state.Virtio.Devices), state.VCPUs[0].Regs.RIP)
	}
	// Nothing is lost: what this version writes of it is the same.
	again, err := encodeState(state)
	testenv.Check(t, err)
	if !bytes.Equal(again, saved) {
		t.Errorf("the state has %d bytes when it is encoded again, and had %d", len(again), len(saved))
	}
}

func loadGolden(t *testing.T, config, saved []byte) {
	testenv.NeedKVM(t)
	testenv.NeedRoot(t, "a tap is opened")
	b := Builder{Devices: goldenSpec(t).Devices[3:], Log: vmtest.Log(t)}
	target, err := b.BuildTarget(t.Context(), config)
	if err != nil {
		t.Logf("this host cannot run the guest, so only decoding was tested: %v", err)
		return
	}
	defer func() { testenv.Check(t, target.Discard()) }()
	testenv.Check(t, target.Boot()) // memory, for the devices' queues and the entry
	testenv.Check(t, target.PrepareState(saved))
	testenv.Check(t, target.LoadState(t.Context(), saved))
	testenv.Check(t, target.Start(t.Context(), false))
	testenv.Check(t, target.Pause(t.Context()))
}

// saveGolden writes the files from a guest that has run and is paused.
func saveGolden(t *testing.T, dir string) {
	t.Helper()
	spec, err := goldenSpec(t).Complete(cpu.Host)
	testenv.Check(t, err)
	tape := vmtest.NewTape()
	m, err := New(spec, Ends{Serial: tape}, vmtest.Log(t))
	testenv.Check(t, err)
	defer func() { testenv.Check(t, m.Close()) }()
	testenv.Check(t, m.Boot())
	testenv.Check(t, m.Start(false))
	tape.Await(t, "B")
	testenv.Check(t, m.SetBalloon(4<<20))
	testenv.Check(t, m.Pause(t.Context()))
	config, err := m.Source().MigrationConfig()
	testenv.Check(t, err)
	saved, err := m.Source().SaveState(t.Context())
	testenv.Check(t, err)
	testenv.Check(t, os.MkdirAll(dir, 0o755))
	testenv.Check(t, os.WriteFile(filepath.Join(dir, "spec.cbor"), config, 0o644))
	testenv.Check(t, os.WriteFile(filepath.Join(dir, "state.cbor"), saved, 0o644))
}
