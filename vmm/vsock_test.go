package vmm

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/vsock"
)

// TestVsockFollows: the host's socket of a VM's socket device is there when the VM
// is made, another VM cannot have it, and a migration takes it along. What the guest
// sees of it is tested in package machine.
func TestVsockFollows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v")
	cfg := testConfig(1, vmtest.Obey)
	cfg.Devices = []virtio.Spec{&vsock.Spec{Config: vsock.Config{CID: 77, Path: path}}}
	vm := running(t, cfg, "B")
	vmtest.ExpectEnd(t, vmtest.Connect(t, path, 1))
	if _, err := NewVM(cfg); err == nil || !strings.Contains(err.Error(), "vsock "+path+": listen: another process listens there") {
		t.Fatalf("a second VM with the socket: %v", err)
	}
	next := receiving(t, ReceiveConfig{})
	if res := vm.migrateTo(t, next.Addr().String()); res.Status != "completed" {
		t.Fatalf("%+v", res)
	}
	vm.ends(t, Migrated, "")
	vmtest.ExpectEnd(t, vmtest.Connect(t, path, 1))
	if i := next.Info().Devices.Of("vsock"); i == nil || *i.(*vsock.Info) != (vsock.Info{CID: 77, Path: path}) {
		t.Errorf("at the destination: %+v", i)
	}
}
