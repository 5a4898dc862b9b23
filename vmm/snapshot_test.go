package vmm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/vsock"
	"github.com/govmm/govmm/vmm/acpi"
	"github.com/govmm/govmm/vmm/snapshot"
)

// withDevices starts a guest with a disk and a socket device.
func withDevices(t *testing.T) (vm *ran, dir string) {
	t.Helper()
	needKVM(t)
	dir = t.TempDir()
	image := filepath.Join(dir, "a.img")
	check(t, os.WriteFile(image, bytes.Repeat([]byte("as it was"), 512), 0o600))
	cfg := testConfig(2, vmtest.Obey)
	cfg.Devices = []virtio.Spec{&blk.Spec{Config: blk.Config{Path: image}}, &vsock.Spec{Config: vsock.Config{CID: 77, Path: filepath.Join(dir, "v")}}}
	return running(t, cfg, "B"), dir
}

// restored runs a snapshot.
func restored(t *testing.T, dir string, cfg RestoreConfig) *ran {
	t.Helper()
	s, err := snapshot.Open(dir)
	check(t, err)
	defer s.Close()
	con := vmtest.NewTape()
	cfg.Serial, cfg.Log = con, vmtest.Log(t)
	vm, err := NewRestored(t.Context(), s, cfg)
	check(t, err)
	return run(t, vm, con)
}

// generation is the VM generation ID that a guest finds.
func generation(t *testing.T, vm *ran) (g acpi.Generation) {
	t.Helper()
	b := make([]byte, acpi.GenerationSize)
	check(t, vm.current().Memory().ReadAt(b, acpi.GenerationMarker))
	g, ok := acpi.ParseGeneration(b)
	if !ok {
		t.Fatal("the guest has no VM generation ID")
	}
	return g
}

// TestSnapshot: a guest goes on after a snapshot, and its copies go on from there, at the
// same time, each with disks and an identity of its own.
func TestSnapshot(t *testing.T) {
	vm, dir := withDevices(t)
	at := filepath.Join(dir, "one")
	m, res, err := vm.Snapshot(t.Context(), at, SnapshotOptions{Options: snapshot.Options{Disks: snapshot.DisksReflink}})
	if err != nil || res.Status != "completed" || m.Name != "test" || len(m.Disks) != 1 || m.Disks[0].Kept == snapshot.DisksNone {
		t.Fatalf("%+v, %+v, %v", m, res, err)
	}
	vm.is(t, StateRunning)
	vm.con.Type("x")
	vm.con.Await(t, "Bx")
	check(t, os.WriteFile(filepath.Join(dir, "a.img"), bytes.Repeat([]byte("is now..."), 512), 0o600)) // as the guest would

	seen := map[string]bool{fmt.Sprint(generation(t, vm)): true, "77": true}
	var copies []*ran
	for i, mode := range []snapshot.Mode{snapshot.Lazy, snapshot.Eager, snapshot.Auto} {
		name := fmt.Sprintf("copy%d", i)
		next := restored(t, at, RestoreConfig{Name: name, Mode: mode, DiskDir: dir, NewIdentity: true,
			Devices: []virtio.Spec{&vsock.Spec{Config: vsock.Config{Path: filepath.Join(dir, name)}}}})
		for _, who := range []string{fmt.Sprint(generation(t, next)), fmt.Sprint(next.Info().Devices.Of("vsock").(*vsock.Info).CID)} {
			if seen[who] {
				t.Errorf("%s: another one is %s, too", name, who)
			}
			seen[who] = true
		}
		image, err := os.ReadFile(filepath.Join(dir, name+"-disk0.img"))
		if err != nil || !bytes.HasPrefix(image, []byte("as it was")) {
			t.Errorf("%s: the disk has %.20q, %v", name, image, err)
		}
		copies = append(copies, next)
	}
	for _, next := range copies {
		next.con.Type("y")
		next.con.Await(t, "y")
		before := generation(t, next)
		next.con.Type("r")
		next.con.Await(t, "yB")
		if now := generation(t, next); now != before {
			t.Error("a reset has changed the VM generation ID")
		}
		next.con.Type("p")
		next.ends(t, PoweredOff, "")
	}
	// A second one of a name does not get the disks of the first.
	s, err := snapshot.Open(at)
	check(t, err)
	defer s.Close()
	if _, err := NewRestored(t.Context(), s, RestoreConfig{Name: "copy0", DiskDir: dir}); !errors.Is(err, os.ErrExist) {
		t.Errorf("the same disks again: %v", err)
	}
	if _, err := NewRestored(t.Context(), s, RestoreConfig{}); err == nil || !strings.Contains(err.Error(), "--disk (for disk ") {
		t.Errorf("without disks: %v", err)
	}
}

// TestSnapshotAndStop: the VM ends when the snapshot is there, and goes on if it cannot be
// kept; and disks that are not kept must be as they were.
func TestSnapshotAndStop(t *testing.T) {
	vm, dir := withDevices(t)
	taken := filepath.Join(dir, "taken")
	ln := newLocal()
	k, err := snapshot.Keep(taken, ln, snapshot.Options{})
	check(t, err)
	check(t, os.Mkdir(taken, 0o700)) // meanwhile
	_, err = vm.Migrate(t.Context(), taken, migrate.Options{Dial: ln.dial, Snapshot: &migrate.Snapshot{Stop: true}})
	if err == nil || !strings.Contains(err.Error(), "the guest goes on here") || !strings.Contains(err.Error(), "file exists") {
		t.Errorf("a name that was taken: %v", err)
	}
	if _, err := k.Close(nil); err == nil {
		t.Error("a snapshot was kept")
	}
	vm.is(t, StateRunning)
	vm.con.Type("x")
	vm.con.Await(t, "Bx")

	at := filepath.Join(dir, "one")
	_, _, err = vm.Snapshot(t.Context(), at, SnapshotOptions{Stop: true})
	check(t, err)
	vm.ends(t, Saved, "the guest was saved")
	vm.is(t, StateStopped)
	list, err := os.ReadDir(dir)
	check(t, err)
	for _, e := range list {
		if strings.HasPrefix(e.Name(), ".") {
			t.Errorf("%s is left", e.Name())
		}
	}
	s, err := snapshot.Open(at)
	check(t, err)
	defer s.Close()
	image := filepath.Join(dir, "a.img")
	was, err := os.ReadFile(image)
	check(t, err)
	check(t, os.WriteFile(image, bytes.Repeat([]byte("is now..."), 512), 0o600))
	if _, err := NewRestored(t.Context(), s, RestoreConfig{AllowSourcePaths: true}); err == nil || !strings.Contains(err.Error(), "other bytes") && !strings.Contains(err.Error(), "same storage") {
		t.Errorf("a disk that is not as it was: %v", err)
	}
	check(t, os.WriteFile(image, was, 0o600))
	next := restored(t, at, RestoreConfig{AllowSourcePaths: true})
	next.con.Type("z")
	next.con.Await(t, "z")
	if c := next.Info().Devices.Of("vsock").(*vsock.Info).CID; c != 77 {
		t.Errorf("CID %d, expected that of the guest", c)
	}
	// A copy is kept again, and moves.
	_, _, err = next.Snapshot(t.Context(), filepath.Join(dir, "two"), SnapshotOptions{})
	check(t, err)
	there := receiving(t, ReceiveConfig{})
	if res := next.migrateTo(t, there.Addr().String()); res.Status != "completed" {
		t.Fatalf("%+v", res)
	}
	there.con.Type("w")
	there.con.Await(t, "w")
}

// TestHostileSnapshot: whatever a state or a spec has, it is refused, or makes a machine;
// nothing hangs, and nothing runs meanwhile.
func TestHostileSnapshot(t *testing.T) {
	vm := obeying(t)
	dir := filepath.Join(t.TempDir(), "one")
	_, _, err := vm.Snapshot(t.Context(), dir, SnapshotOptions{})
	check(t, err)
	r := rand.New(rand.NewPCG(5, 6))
	for i := range 60 {
		name := []string{"state.cbor", "spec.cbor"}[i%2]
		bad := filepath.Join(t.TempDir(), "bad")
		check(t, os.CopyFS(bad, os.DirFS(dir)))
		path := filepath.Join(bad, name)
		b, err := os.ReadFile(path)
		check(t, err)
		for range 1 + r.IntN(3) {
			b[r.IntN(len(b))] ^= byte(1 << r.IntN(8))
		}
		if i%5 == 0 {
			b = b[:r.IntN(len(b))]
		}
		check(t, os.WriteFile(path, b, 0o600))
		resum(t, bad, name, b)
		s, err := snapshot.Open(bad)
		if err != nil {
			t.Errorf("the sums are right: %v", err)
			continue
		}
		con := vmtest.NewTape()
		vm, err := NewRestored(t.Context(), s, RestoreConfig{Serial: con, Mode: snapshot.Lazy})
		if err == nil {
			check(t, vm.Stop(vmtest.Within(t)))
		} else if strings.Contains(err.Error(), "goroutine") {
			t.Error(err)
		}
		check(t, s.Close())
	}
}

// resum makes the manifest's sum of a part right.
func resum(t *testing.T, dir, name string, b []byte) {
	t.Helper()
	path := filepath.Join(dir, "manifest.json")
	text, err := os.ReadFile(path)
	check(t, err)
	var m map[string]any
	check(t, json.Unmarshal(text, &m))
	sum := sha256.Sum256(b)
	m["parts"].(map[string]any)[name] = map[string]any{"bytes": len(b), "sha256": hex.EncodeToString(sum[:])}
	text, err = json.Marshal(m)
	check(t, err)
	check(t, os.WriteFile(path, text, 0o600))
}
