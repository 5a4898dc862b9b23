package kvm

import (
	"errors"
	"fmt"
	"testing"

	"github.com/govmm/govmm/internal/testenv"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// openKVM opens /dev/kvm, or skips the test.
func openKVM(t testing.TB) *System {
	t.Helper()
	testenv.NeedKVM(t)
	s, err := Open()
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

var check = testenv.Check

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
