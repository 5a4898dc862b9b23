package vmm

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/guest"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/rng"
	"github.com/govmm/govmm/virtio/vsock"
)

// inside says that this process is the one of TestNothingIsOpenedLate.
const inside = "GOVMM_TEST_LATE"

// TestNothingIsOpenedLate runs a guest with all devices, resets it, measures it, moves it to
// a receiver that was made before, and resets it there, in a process whose root directory
// becomes, before the guest's first instruction, one that has nothing but the disk image and
// an empty directory for the sockets: whatever else is opened late is not there.
func TestNothingIsOpenedLate(t *testing.T) {
	needKVM(t)
	if os.Getenv(inside) == "" {
		if os.Geteuid() != 0 {
			t.Skip("chroot needs root")
		}
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestNothingIsOpenedLate$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"="+t.TempDir())
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	dir := os.Getenv(inside)
	image, socket, root := filepath.Join(dir, "a.img"), filepath.Join(dir, "v.sock"), filepath.Join(dir, "root")
	check(t, os.MkdirAll(filepath.Join(root, dir), 0o700))
	check(t, os.WriteFile(image, nil, 0o600))
	check(t, os.Truncate(image, 1<<20))
	check(t, os.Link(image, filepath.Join(root, image)))

	tape, next := vmtest.NewTape(), vmtest.NewTape()
	vm, err := NewVM(Config{Cmdline: guest.DefaultCmdline, Serial: tape, Console: vmtest.NewTape(), Log: vmtest.Log(t), Devices: []virtio.Spec{
		&blk.Spec{Config: blk.Config{Path: image}}, &balloon.Spec{}, &rng.Spec{}, &vsock.Spec{Config: vsock.Config{Path: socket}}}})
	check(t, err)
	receiver, err := NewReceiver(ReceiveConfig{Listener: listen(t), Serial: next, Console: vmtest.NewTape(), Log: vmtest.Log(t),
		Devices: []virtio.Spec{disk(image), &vsock.Spec{Config: vsock.Config{Path: socket}}}})
	check(t, err)
	check(t, syscall.Chroot(root))
	check(t, os.Chdir("/"))

	a := run(t, vm, tape)
	const banner = "govmm demo guest: 1 vCPU"
	tape.AwaitPart(t, banner)
	tape.Type("reboot\r")
	tape.AwaitThat(t, "a second start", func(s string) bool { return strings.Count(s, banner) == 2 })
	check(t, a.Pause(t.Context()))
	check(t, a.Resume(t.Context(), false))
	_, err = a.MeasureDirtyRate(t.Context(), 100*time.Millisecond)
	check(t, err)
	b := run(t, receiver, next)
	_, err = a.EstimateMigration(t.Context(), receiver.Addr().String(), migrate.Options{}, 100*time.Millisecond)
	check(t, err)
	if r := a.migrateTo(t, receiver.Addr().String()); r.Status != "completed" {
		t.Fatalf("%+v", r)
	}
	next.Type("reboot\r")
	next.AwaitPart(t, banner)
	next.Type("poweroff\r")
	b.ends(t, PoweredOff, "")
}
