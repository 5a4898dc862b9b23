package vmm

import (
	"fmt"
	stdnet "net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
)

// disk is a spec of a disk.
func disk(path string) *blk.Spec { return &blk.Spec{Config: blk.Config{Path: path}} }

func cannotLock(t *testing.T, err error) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), "another process or disk uses it") {
		t.Errorf("error %v, want one of the disk's lock", err)
	}
}

// TestNewVMLocksTheDisk: NewVM fails if another VM has the disk. The lock ends with the
// VM, whether that has run or not.
func TestNewVMLocksTheDisk(t *testing.T) {
	needKVM(t)
	cfg := testConfig(1, vmtest.Obey)
	cfg.Devices = []virtio.Spec{disk(vmtest.Image(t, "a.img", 1<<20))}
	vm, err := NewVM(cfg)
	check(t, err)
	_, err = NewVM(cfg)
	cannotLock(t, err)
	check(t, vm.Stop(vmtest.Within(t)))
	vm, err = NewVM(cfg)
	check(t, err)
	check(t, vm.Stop(vmtest.Within(t)))
}

// TestResetKeepsTheDisk: after a reset nobody else can lock the disk.
func TestResetKeepsTheDisk(t *testing.T) {
	needKVM(t)
	cfg := testConfig(1, vmtest.Obey)
	path := vmtest.Image(t, "a.img", 1<<20)
	cfg.Devices = []virtio.Spec{disk(path)}
	vm := running(t, cfg, "B")
	vm.con.Type("r")
	vm.con.Await(t, "BB")
	other, err := disk(path).Open(vmtest.Log(t))
	check(t, err)
	cannotLock(t, other.(virtio.Locker).Lock())
	check(t, other.Close())
	if i := vm.Info(); len(i.Devices) != 1 || i.Devices[0].Info.(*blk.Info).Size != 1<<20 || i.Devices[0].Info.(*blk.Info).Path != path {
		t.Errorf("%+v", i.Devices)
	}
}

// TestResetKeepsTheTap: a reset keeps the interface, with its settings and its place in
// a bridge, and nobody else can open it. A tap that the VMM has made would vanish when
// the VMM closes it.
func TestResetKeepsTheTap(t *testing.T) {
	needKVM(t)
	testenv.NeedRoot(t, "a tap")
	name := fmt.Sprintf("gvreset%d", os.Getpid()%1e6)
	options, err := net.ParseOptions("tap=" + name + ",mac=52:54:00:0a:0b:0c")
	check(t, err)
	cfg := testConfig(1, vmtest.Obey)
	cfg.Devices = []virtio.Spec{&net.Spec{Options: options}}
	vm := running(t, cfg, "B")
	before, err := stdnet.InterfaceByName(name)
	check(t, err)
	for i := range 3 {
		vm.con.Type("r")
		vm.con.Await(t, strings.Repeat("B", i+2))
		after, err := stdnet.InterfaceByName(name)
		check(t, err)
		if after.Index != before.Index {
			t.Errorf("the tap was interface %d and is %d", before.Index, after.Index)
		}
		if tap, err := net.OpenTap(options); err == nil {
			t.Error("the tap can be opened a second time")
			check(t, tap.Close())
		} else if !strings.Contains(err.Error(), "another process uses it") {
			t.Error(err)
		}
	}
	if i := vm.Info(); len(i.Devices) != 1 || i.Devices[0].Info.(*net.Info).Tap != name {
		t.Errorf("devices %+v", i.Devices)
	}
	if err := vm.Stop(vmtest.Within(t)); err != nil {
		t.Error(err)
	}
	vm.ends(t, Stopped, "")
	if _, err := stdnet.InterfaceByName(name); err == nil {
		t.Error("the tap is left behind")
	}
}

// faulty prints F and makes a triple fault.
var faulty = []byte{
	0x66, 0xba, 0xf8, 0x03, // mov $0x3f8,%dx
	0xb0, 'F', // mov $'F',%al
	0xee,                                     // out %al,(%dx)
	0x0f, 0x01, 0x1d, 0x10, 0x00, 0x10, 0x00, // lidt 100010
	0x0f, 0x0b, // ud2
	0, 0, 0, 0, 0, 0, // 10: an IDT with nothing in it
}

// TestATripleFaultIsAReset: as on a PC. A guest that does nothing else starts again and
// again, later and later, and can be paused and stopped meanwhile.
func TestATripleFaultIsAReset(t *testing.T) {
	said := make(chan string, 1000)
	cfg := testConfig(1, vmtest.Obey)
	cfg.Log = vmtest.LogTo(said)
	vm := running(t, cfg, "B")
	vm.con.Type("t")
	vm.con.Await(t, "BB")
	if line := <-said; !strings.Contains(line, "triple fault of vCPU 0") {
		t.Errorf("it says %q", line)
	}
	vm.con.Type("x")
	vm.con.Await(t, "BBx")

	cfg = testConfig(1, faulty)
	cfg.Log = vmtest.LogTo(said)
	loop := running(t, cfg, strings.Repeat("F", freeResets+3))
	check(t, loop.Pause(vmtest.Within(t)))
	check(t, loop.Stop(vmtest.Within(t)))
	loop.ends(t, Stopped, "")
	if n := len(said); n > freeResets {
		t.Errorf("%d lines about so many resets", n)
	}
}

// TestResetsArePaced: a guest that resets itself without an end costs little, and says
// little. One that lives is not held up.
func TestResetsArePaced(t *testing.T) {
	var r resets
	var waited time.Duration
	lines := 0
	for range 10_000 {
		wait, tell := r.next(shortLife / 20)
		waited += wait
		if tell {
			lines++
		}
	}
	if waited < 9_900*longestWait || lines > 20 {
		t.Errorf("10,000 resets: %v waited, %d lines", waited, lines)
	}
	for range 3 {
		if wait, tell := r.next(shortLife); wait != 0 || !tell {
			t.Errorf("a guest that has lived waits %v, logged: %v", wait, tell)
		}
	}
}
