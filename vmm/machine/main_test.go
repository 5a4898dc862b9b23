package machine

import (
	"encoding/binary"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/memory"
)

var (
	check    = testenv.Check
	needKVM  = testenv.NeedKVM
	patience = testenv.Patience
)

func TestMain(m *testing.M) { testenv.Main(m) }

// testSpec describes a small machine that runs code, 32-bit flat, at 1 MiB.
func testSpec(t testing.TB, cpus int, code []byte, devices ...virtio.Spec) Spec {
	t.Helper()
	needKVM(t)
	spec, err := Spec{Name: "test", CPUs: cpus, Memory: 16 << 20, Backing: memory.DefaultBacking, Kernel: vmtest.Kernel(code), Devices: devices}.Complete("")
	check(t, err)
	return spec
}

// newMachine makes a machine that has booted and not started.
func newMachine(t testing.TB, cpus int, code []byte, con virtio.Console) *Machine {
	t.Helper()
	m := fromSpec(t, testSpec(t, cpus, code), con)
	check(t, m.Boot())
	return m
}

// fromSpec makes a machine with empty memory.
func fromSpec(t testing.TB, spec Spec, con virtio.Console) *Machine {
	t.Helper()
	m, err := New(spec, Ends{Serial: con}, vmtest.Log(t))
	check(t, err)
	t.Cleanup(func() { check(t, m.Close()) })
	return m
}

func wait(t testing.TB, m *Machine) Exit {
	t.Helper()
	exit, err := m.Wait(vmtest.Within(t))
	check(t, err)
	return exit
}

// word reads a 32-bit word of guest memory.
func word(t testing.TB, m *Machine, gpa uint64) uint32 {
	t.Helper()
	var b [4]byte
	check(t, m.Memory().ReadAt(b[:], gpa))
	return binary.LittleEndian.Uint32(b[:])
}

// word64 reads a 64-bit word of guest memory.
func word64(t testing.TB, m *Machine, gpa uint64) uint64 {
	t.Helper()
	return uint64(word(t, m, gpa)) | uint64(word(t, m, gpa+4))<<32
}

// awaitChange waits until the guest, which goes on changing a word of its memory,
// has changed it.
func awaitChange(t testing.TB, m *Machine, gpa uint64, was uint32) {
	t.Helper()
	for deadline := time.Now().Add(patience); word(t, m, gpa) == was; {
		if time.Now().After(deadline) {
			t.Fatalf("the guest has stopped changing %#x, which is %#x", gpa, was)
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// newCounting makes a machine of two vCPUs that count, and starts it.
func newCounting(t testing.TB) *Machine {
	t.Helper()
	m := newMachine(t, 2, vmtest.WakeAndCount, nil)
	startCounting(t, m)
	return m
}

func startCounting(t testing.TB, m *Machine) {
	t.Helper()
	check(t, m.Memory().WriteAt(vmtest.APCount, vmtest.APCodeAt))
	check(t, m.Start(false))
	awaitChange(t, m, vmtest.CountAt, 0)
	awaitChange(t, m, vmtest.APCountAt, 0)
}

// counter is a device of 4-byte registers, all of which give one number more
// at each read.
type counter struct {
	readMu sync.Mutex // guards n
	n      uint32
}

func (c *counter) Read(_ uint64, p []byte) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], c.n)
	c.n++
	copy(p, b[:])
}

func (c *counter) Write(uint64, []byte) {}

func (c *counter) count() uint32 {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	return c.n
}
