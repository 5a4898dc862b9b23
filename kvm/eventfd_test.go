package kvm

import (
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

func newEventFD(t *testing.T) int {
	t.Helper()
	fd := must(unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK))(t)
	t.Cleanup(func() { check(t, unix.Close(fd)) })
	return fd
}

func signal(t *testing.T, fd int) {
	t.Helper()
	must(unix.Write(fd, binary.LittleEndian.AppendUint64(nil, 1)))(t)
}

// signals reads and resets an eventfd's count.
func signals(t *testing.T, fd int) uint64 {
	t.Helper()
	var count [8]byte
	if _, err := unix.Read(fd, count[:]); errors.Is(err, unix.EAGAIN) {
		return 0
	} else {
		check(t, err)
	}
	return binary.LittleEndian.Uint64(count[:])
}

// An eventfd raises its GSI. Detaching it waits for pending injections, so the test
// can then check the PIC.
func TestIRQFD(t *testing.T) {
	vm := newVM(t)
	fd := newEventFD(t)
	if err := vm.IRQFD(5, fd, 0); err == nil {
		t.Error("an irqfd without interrupt chips")
	}
	check(t, vm.CreateIRQChip())
	check(t, vm.IRQFD(5, fd, 0))
	signal(t, fd)
	check(t, vm.IRQFD(5, fd, IRQFDDeassign))
	if got := picIRR(t, vm); got != 1<<5 {
		t.Errorf("requests %#x, want line 5", got)
	}
	wantErr(t, vm.IRQFD(5, -1, 0), unix.EBADF, "KVM_IRQFD GSI 5 eventfd -1 flags 0x0: bad file descriptor")
	wantErr(t, vm.IRQFD(5, fd, 2), unix.EINVAL, "KVM_IRQFD GSI 5 flags 0x2: only IRQFDDeassign may be set: invalid argument")
}

// A write to the address of an ioeventfd does not exit; a write beside it does.
func TestIOEventFD(t *testing.T) {
	vm := newVM(t)
	fd := newEventFD(t)
	e := IOEventFD{Addr: nowhere, FD: fd}
	check(t, vm.IOEventFD(e))
	g := newRing3Guest(t, vm,
		0x88, 0x01, // mov %al, (%rcx)
		0x89, 0x01, // mov %eax, (%rcx)
		0x88, 0x41, 0x08, // mov %al, 8(%rcx)
		0x88, 0x01, // mov %al, (%rcx)
	)
	g.next(t, ExitMMIO)
	if m := g.MMIO(); m.Addr != nowhere+8 {
		t.Errorf("exit %+v, want the write to %#x", m, nowhere+8)
	}
	if n := signals(t, fd); n != 2 {
		t.Errorf("%d signals, want 2", n)
	}
	e.Flags = IOEventFDDeassign
	check(t, vm.IOEventFD(e))
	g.next(t, ExitMMIO)
	if m := g.MMIO(); m.Addr != nowhere {
		t.Errorf("exit %+v, want the write to %#x", m, nowhere)
	}
	wantErr(t, vm.IOEventFD(e), unix.ENOENT,
		"KVM_IOEVENTFD address 0x30000000 eventfd "+decimal(fd)+" flags 0x4: no such file or directory")
}
