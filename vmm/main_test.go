package vmm

import (
	"bytes"
	"context"
	"encoding/binary"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/vmm/loader/elftest"
)

var (
	check    = testenv.Check
	needKVM  = testenv.NeedKVM
	patience = testenv.Patience
)

func TestMain(m *testing.M) { testenv.Main(m) }

func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// testConfig is a small machine that runs code, 32-bit flat, at 1 MiB.
func testConfig(cpus int, code []byte) Config {
	return Config{Name: "test", CPUs: cpus, Memory: 16 << 20, Kernel: elftest.Build(elftest.Kernel{Code: code})}
}

// newMachine makes a machine that has booted and not started.
func newMachine(t testing.TB, cpus int, code []byte, con Console) *Machine {
	t.Helper()
	needKVM(t)
	spec, err := NewSpec(testConfig(cpus, code))
	check(t, err)
	m := fromSpec(t, spec, con)
	check(t, m.Boot())
	return m
}

// fromSpec makes a machine with empty memory.
func fromSpec(t testing.TB, spec Spec, con Console) *Machine {
	t.Helper()
	m, err := NewMachine(spec, Ends{Serial: con}, t.Logf)
	check(t, err)
	t.Cleanup(func() { check(t, m.Close()) })
	return m
}

func wait(t testing.TB, m *Machine) Exit {
	t.Helper()
	exit, err := m.Wait(within(t))
	check(t, err)
	return exit
}

// word reads a 32-bit word of guest memory.
func word(t testing.TB, m *Machine, gpa uint64) uint32 {
	t.Helper()
	v, err := m.Memory().ReadUint32(gpa)
	check(t, err)
	return v
}

// awaitChange waits until a word of guest memory, which the guest goes on
// changing, is no longer what it was.
func awaitChange(t testing.TB, m *Machine, gpa uint64, was uint32) {
	t.Helper()
	for deadline := time.Now().Add(patience); word(t, m, gpa) == was; {
		if time.Now().After(deadline) {
			t.Fatalf("the guest has stopped changing %#x, which is %#x", gpa, was)
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// Code for guests; the comments are what it was assembled from.

// obey prints B and then does what it is told from the serial port: p powers
// off, r resets, k resets by the keyboard controller, t makes a triple fault, h
// halts, i executes what no KVM emulates, anything else is printed.
var obey = []byte{
	0x66, 0xba, 0xf8, 0x03, // mov $0x3f8,%dx
	0xb0, 'B', // mov $'B',%al
	0xee,                   // out %al,(%dx)
	0x66, 0xba, 0xfd, 0x03, // 07: mov $0x3fd,%dx
	0xec,       // in (%dx),%al
	0xa8, 0x01, // test $1,%al
	0x74, 0xf7, // je 07
	0x66, 0xba, 0xf8, 0x03, // mov $0x3f8,%dx
	0xec,                  // in (%dx),%al
	0x3c, 'p', 0x74, 0x17, // cmp, je 30
	0x3c, 'r', 0x74, 0x1d, // cmp, je 3a
	0x3c, 'k', 0x74, 0x20, // cmp, je 41
	0x3c, 't', 0x74, 0x23, // cmp, je 48
	0x3c, 'h', 0x74, 0x28, // cmp, je 51
	0x3c, 'i', 0x74, 0x27, // cmp, je 54
	0xee,       // out %al,(%dx)
	0xeb, 0xd7, // jmp 07
	0x66, 0xba, 0x04, 0x06, // 30: mov $0x604,%dx
	0x66, 0xb8, 0x00, 0x20, // mov $0x2000,%ax
	0x66, 0xef, // out %ax,(%dx)
	0x66, 0xba, 0xf9, 0x0c, // 3a: mov $0xcf9,%dx
	0xb0, 0x06, // mov $6,%al
	0xee,                   // out %al,(%dx)
	0x66, 0xba, 0x64, 0x00, // 41: mov $0x64,%dx
	0xb0, 0xfe, // mov $0xfe,%al
	0xee,                                     // out %al,(%dx)
	0x0f, 0x01, 0x1d, 0x5a, 0x00, 0x10, 0x00, // 48: lidt 10005a
	0x0f, 0x0b, // ud2
	0xf4,       // 51: hlt
	0xeb, 0xfd, // jmp 51
	0xdf, 0x35, 0x00, 0x00, 0x00, 0xd0, // 54: fbstp 0xd0000000
	0, 0, 0, 0, 0, 0, // 5a: an IDT with nothing in it
}

// wakeAndCount starts the other vCPU at 0x8000 and counts at countAt, with the
// TSC at tscAt; apCount, which is put at 0x8000, counts at apCountAt.
var (
	wakeAndCount = append([]byte{
		0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0x0c, 0x00, // movl $0xc4500,0xfee00300 (INIT)
		0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0x0c, 0x00, // movl $0xc4608,0xfee00300 (SIPI)
	}, justCount...)
	justCount = []byte{
		0xff, 0x05, 0x00, 0x00, 0x20, 0x00, // incl 0x200000
		0x0f, 0x31, // rdtsc
		0xa3, 0x10, 0x00, 0x20, 0x00, // mov %eax,0x200010
		0x89, 0x15, 0x14, 0x00, 0x20, 0x00, // mov %edx,0x200014
		0xeb, 0xeb, // jmp back
	}
	apCount = []byte{ // 16 bits
		0x31, 0xc0, // xor %ax,%ax
		0x8e, 0xd8, // mov %ax,%ds
		0x66, 0xff, 0x06, 0x00, 0x90, // incl 0x9000
		0xeb, 0xf9, // jmp back
	}
)

const (
	codeAt    = 0x100000 // where elftest.Build puts it
	apCodeAt  = 0x8000
	apCountAt = 0x9000
	countAt   = 0x200000
	tscAt     = 0x200010
)

// newCounting makes a machine of two vCPUs that count, and starts it.
func newCounting(t testing.TB) *Machine {
	t.Helper()
	m := newMachine(t, 2, wakeAndCount, nil)
	check(t, m.Memory().WriteAt(apCount, apCodeAt))
	check(t, m.Start(false))
	awaitChange(t, m, countAt, 0)
	awaitChange(t, m, apCountAt, 0)
	return m
}

// tape is a serial backend for tests: what the guest writes is kept, what the
// test types is read.
type tape struct {
	typed chan byte

	outMu  sync.Mutex // guards out, closed
	moved  *sync.Cond
	out    bytes.Buffer
	closed bool
}

func newTape() *tape {
	c := &tape{typed: make(chan byte, 64)}
	c.moved = sync.NewCond(&c.outMu)
	return c
}

func (c *tape) Write(p []byte) (int, error) {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	defer c.moved.Broadcast()
	return c.out.Write(p)
}

func (c *tape) ReadInput(ctx context.Context, p []byte) (int, error) {
	select {
	case p[0] = <-c.typed:
		return 1, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

func (c *tape) Close() error {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	c.closed = true
	c.moved.Broadcast()
	return nil
}

func (c *tape) text() string {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	return c.out.String()
}

func (c *tape) keys(s string) {
	for _, b := range []byte(s) {
		c.typed <- b
	}
}

// await waits until the output is text.
func (c *tape) await(t testing.TB, text string) {
	t.Helper()
	c.awaitThat(t, text, func(out string) bool { return out == text })
}

// awaitPart waits until the output has part in it.
func (c *tape) awaitPart(t testing.TB, part string) {
	t.Helper()
	c.awaitThat(t, part, func(out string) bool { return strings.Contains(out, part) })
}

func (c *tape) awaitThat(t testing.TB, what string, is func(string) bool) {
	t.Helper()
	late := time.AfterFunc(patience, func() { _ = c.Close() })
	defer late.Stop()
	c.outMu.Lock()
	defer c.outMu.Unlock()
	for !is(c.out.String()) {
		if c.closed {
			t.Fatalf("the guest wrote %q, not %q", c.out.String(), what)
		}
		c.moved.Wait()
	}
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
