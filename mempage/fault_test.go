package mempage_test

import (
	"errors"
	"io"
	"testing"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// truncated maps pages of a file of which only the first exists.
func truncated(t *testing.T, pages int) []byte {
	t.Helper()
	fd, err := unix.MemfdCreate("short", unix.MFD_CLOEXEC)
	if err == nil {
		err = unix.Ftruncate(fd, mempage.Size)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	b, err := unix.Mmap(fd, 0, pages*mempage.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return b
}

func TestGuard(t *testing.T) {
	b := truncated(t, 2)
	base := uintptr(unsafe.Pointer(&b[0]))
	own := make([]byte, 2*mempage.Size)
	deferred := 0
	for name, access := range map[string]func(){
		"load":     func() { own[0] = b[mempage.Size+8] },
		"store":    func() { b[mempage.Size+8] = 1 },
		"copy out": func() { copy(own, b) },
		"copy in":  func() { copy(b[mempage.Size:], own) },
		"clear":    func() { clear(b[mempage.Size:]) },
		"nested": func() {
			if err := mempage.Guard(func() error { b[0]++; return io.EOF }); err != io.EOF {
				t.Errorf("inside: %v", err)
			}
			b[mempage.Size]++
		},
	} {
		err := mempage.Guard(func() error {
			defer func() { deferred++ }()
			access()
			return nil
		})
		var f *mempage.Fault
		if !errors.As(err, &f) || f.Addr < base+mempage.Size || f.Addr >= base+2*mempage.Size {
			t.Errorf("%s: %v, the page is at %#x", name, err, base+mempage.Size)
		}
	}
	if deferred != 6 {
		t.Errorf("%d of 6 deferred calls", deferred)
	}
	if err := mempage.Guard(func() error { b[0] = 1; return io.EOF }); err != io.EOF {
		t.Errorf("without a fault: %v", err)
	}
	if n := testing.AllocsPerRun(100, func() { _ = mempage.Guard(func() error { b[0]++; return nil }) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Other panics stay panics.
func TestGuardPanics(t *testing.T) {
	for name, f := range map[string]func() error{
		"nil":   func() error { var p *int; *p = 1; return nil },
		"index": func() error { var b []byte; return io.EOF.(interface{ x(byte) error }).x(b[0]) },
		"value": func() error { panic("value") },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			_ = mempage.Guard(f)
		}()
	}
}
