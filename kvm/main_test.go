package kvm

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// noKVM says whether err means that this machine has no KVM for us, as against
// one that is there and broken.
func noKVM(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) ||
		errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)
}

// TestMain leaves out the examples, which cannot skip themselves, where there is
// no KVM.
func TestMain(m *testing.M) {
	s, err := Open()
	if noKVM(err) {
		fmt.Fprintf(os.Stderr, "NO KVM HERE, examples are skipped: %v\n", err)
		flag.Parse()
		if flag.Lookup("test.skip").Value.String() == "" {
			if err := flag.Set("test.skip", "^Example"); err != nil {
				panic(err)
			}
		}
	} else if err == nil {
		if err := s.Close(); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// openKVM opens /dev/kvm, or skips loudly where there is none.
func openKVM(t testing.TB) *System {
	t.Helper()
	s, err := Open()
	if noKVM(err) {
		t.Skipf("NO KVM HERE, nothing was tested: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, s.Close()) })
	return s
}

// newVM makes an empty VM.
func newVM(t testing.TB) *VM {
	t.Helper()
	vm, err := openKVM(t).CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, vm.Close()) })
	return vm
}

// newVCPU makes vCPU 0 of a VM.
func newVCPU(t testing.TB, vm *VM) *VCPU {
	t.Helper()
	v, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, v.Close()) })
	return v
}

// newChipVCPU makes a VM with interrupt chips and one vCPU.
func newChipVCPU(t testing.TB) (*VM, *VCPU) {
	t.Helper()
	vm := newVM(t)
	check(t, vm.CreateIRQChip())
	return vm, newVCPU(t, vm)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// must returns a call's value, or fails the test.
func must[T any](value T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		check(t, err)
		return value
	}
}

func wantErr(t testing.TB, err, is error, text string) {
	t.Helper()
	if !errors.Is(err, is) || err.Error() != text {
		t.Errorf("error %q\nwant  %q, which is %v", err, text, is)
	}
}

// mapMemory maps anonymous memory for guests.
func mapMemory(t testing.TB, size int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, unix.Munmap(mem)) })
	return mem
}

func hex(n uintptr) string { return fmt.Sprintf("%#x", n) }

func decimal(n int) string { return fmt.Sprint(n) }
