package vmm

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/diskboot"
	"github.com/govmm/govmm/vmm/machine"
)

// firstSector reads a kernel that lies on a disk as it is, with its length before it: what is
// tested here is who reads when.
type firstSector struct {
	reads  atomic.Int32
	closed atomic.Bool
	fail   atomic.Bool
	during func() // called while the disk is read
}

func (f *firstSector) Read(_ context.Context, d diskboot.Disk, entry string) (*diskboot.Image, error) {
	f.reads.Add(1)
	if f.fail.Load() {
		return nil, errors.New("it is broken")
	}
	if f.during != nil {
		f.during()
	}
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		return nil, err
	}
	n := int(b[0]) | int(b[1])<<8 | int(b[2])<<16
	return &diskboot.Image{Kernel: b[4 : 4+n], Entry: diskboot.Entry{ID: entry, Title: "test", Kernel: "/k"}}, nil
}

func (f *firstSector) Close() error {
	f.closed.Store(true)
	return nil
}

var _ io.Closer = (*firstSector)(nil)

// putKernel writes a kernel that does as code says to a disk.
func putKernel(t *testing.T, path string, code []byte) {
	t.Helper()
	k := vmtest.Kernel(code)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	check(t, err)
	_, err = f.WriteAt(append([]byte{byte(len(k)), byte(len(k) >> 8), byte(len(k) >> 16), 0}, k...), 0)
	check(t, errors.Join(err, f.Close()))
}

// diskBooted is a VM that boots from a disk.
func diskBooted(t *testing.T) (Config, *firstSector, string) {
	path := vmtest.Image(t, "a.img", 1<<20)
	putKernel(t, path, vmtest.Obey)
	r := new(firstSector)
	return Config{Name: "test", Memory: 16 << 20, Devices: []virtio.Spec{disk(path)}, DiskBoot: true, BootEntry: "x", DiskReader: r}, r, path
}

// greeting is a kernel that prints a letter and then waits for ever.
func greeting(letter byte) []byte {
	return []byte{0x66, 0xba, 0xf8, 0x03, 0xb0, letter, 0xee, 0xf4, 0xeb, 0xfd} // mov dx,0x3f8; mov al; out; hlt; jmp
}

// TestDiskBoot: the kernel is read at the start and at each reset, from a disk that is locked by then.
func TestDiskBoot(t *testing.T) {
	cfg, r, path := diskBooted(t)
	r.during = func() {
		other, err := NewVM(Config{Kernel: vmtest.Kernel(vmtest.Obey), Memory: 16 << 20, Devices: []virtio.Spec{disk(path)}})
		if err == nil {
			check(t, other.Stop(context.Background()))
		}
		cannotLock(t, err)
	}
	vm := running(t, cfg, "B")
	if k := vm.Info().Kernel; k != "test (/k, of disk "+path+")" {
		t.Errorf("the kernel is %q", k)
	}
	putKernel(t, path, greeting('N'))
	vm.con.Type("r")
	vm.con.Await(t, "BN")
	if n := r.reads.Load(); n != 2 {
		t.Errorf("the disk was read %d times, expected 2", n)
	}
}

// TestDiskBootMoves: a guest that has moved boots what is on its disk at the destination, whether it asks for its
// reset there or on the way. The kernel does not travel.
func TestDiskBootMoves(t *testing.T) {
	cfg, r, path := diskBooted(t)
	vm := running(t, cfg, "B")
	there := new(firstSector)
	next := receiving(t, ReceiveConfig{DiskReader: there})
	result1 := vm.migrateTo(t, next.Addr().String())
	if result1.Status != "completed" {
		t.Fatalf("%+v", result1)
	}
	next.con.Type("x")
	next.con.Await(t, "x")
	if there.reads.Load() != 0 || there.closed.Load() {
		t.Errorf("the disk was read %d times before a reset, closed: %v", there.reads.Load(), there.closed.Load())
	}
	next.con.Type("r")
	next.con.Await(t, "xB")
	if there.reads.Load() != 1 || r.reads.Load() != 1 {
		t.Errorf("read %d times at the destination, %d at the source, expected 1 and 1", there.reads.Load(), r.reads.Load())
	}

	// It resets itself while it is moved.
	last := new(firstSector)
	end := receiving(t, ReceiveConfig{DiskReader: last})
	content := make([]byte, noise)
	check(t, next.current().Memory().WriteAt(append(content[:0:0], []byte(strings.Repeat("noise", noise/5))...), noiseAt))
	m := next.inPrecopy(t, end.Addr().String(), migrate.Options{})
	putKernel(t, path, greeting('M'))
	next.con.Type("r")
	if r := result(t, m); r.Status != "completed" || r.GuestResets != 1 {
		t.Errorf("%+v", r)
	}
	end.con.Await(t, "M")
	if last.reads.Load() != 1 {
		t.Errorf("the disk was read %d times, expected 1", last.reads.Load())
	}
}

// TestDiskBootFailsThere: a guest that resets itself on the way, and cannot be booted at the
// destination, is booted at the source.
func TestDiskBootFailsThere(t *testing.T) {
	cfg, _, path := diskBooted(t)
	vm := running(t, cfg, "B")
	there := new(firstSector)
	there.fail.Store(true)
	next := receiving(t, ReceiveConfig{DiskReader: there})
	check(t, vm.current().Memory().WriteAt([]byte(strings.Repeat("noise", noise/5)), noiseAt))
	m := vm.inPrecopy(t, next.Addr().String(), migrate.Options{})
	putKernel(t, path, greeting('S'))
	vm.con.Type("r")
	if r := result(t, m); r.Status == "completed" {
		t.Errorf("%+v", r)
	}
	vm.con.Await(t, "BS")
}

// TestDiskBootWithoutReader: a host that has no reader refuses the guest, and one that needs none closes it.
func TestDiskBootWithoutReader(t *testing.T) {
	cfg, _, _ := diskBooted(t)
	vm := running(t, cfg, "B")
	next := receiving(t, ReceiveConfig{})
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := vm.Migrate(ctx, next.Addr().String(), migrate.Options{}); err == nil || !strings.Contains(err.Error(), "the guest boots from its disk, and this host was not given one for it") {
		t.Errorf("%v", err)
	}
	cfg.DiskReader = nil
	if _, err := NewVM(cfg); err == nil || !strings.Contains(err.Error(), "no process that reads it") {
		t.Errorf("without a reader: %v", err)
	}

	other := running(t, testConfig(1, vmtest.Obey), "B")
	unused := new(firstSector)
	end := receiving(t, ReceiveConfig{DiskReader: unused})
	if r := other.migrateTo(t, end.Addr().String()); r.Status != "completed" {
		t.Fatalf("%+v", r)
	}
	end.con.Type("x")
	end.con.Await(t, "x")
	if !unused.closed.Load() {
		t.Error("a reader that no guest needs is there")
	}
}

var _ machine.KernelReader = (*firstSector)(nil)
