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

// signals takes an eventfd's count.
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

// An eventfd raises its GSI. Taking it off waits for injections under way, so the
// PIC can be looked at then.
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

// A resampling irqfd holds its line up.
func TestIRQFDResample(t *testing.T) {
	vm := newVM(t)
	check(t, vm.CreateIRQChip())
	fd, resample := newEventFD(t), newEventFD(t)
	check(t, vm.IRQFDResample(10, fd, resample))
	signal(t, fd)
	check(t, vm.IRQFD(10, fd, IRQFDDeassign))
	if got := picIRR(t, vm) &^ (1 << 2); got != 1<<10 {
		t.Errorf("requests %#x, want line 10", got)
	}
}

// A port write that an ioeventfd covers does not exit.
func TestIOEventFD(t *testing.T) {
	vm := newVM(t)
	fd := newEventFD(t)
	match := IOEventFD{Datamatch: 7, Addr: 0x20, Len: 1, FD: fd, Flags: IOEventFDPIO | IOEventFDDatamatch}
	check(t, vm.IOEventFD(match))
	g := newRealModeGuest(t, vm,
		0xb0, 0x07, // mov $7, %al
		0xe6, 0x20, // out %al, $0x20
		0xe6, 0x20, // and again
		0xfe, 0xc0, // inc %al
		0xe6, 0x20, // 8 does not match
		0xe6, 0x20, // and again
	)
	g.next(t, ExitIO)
	if io := g.IO(); io.Port != 0x20 || io.Data[0] != 8 {
		t.Errorf("exit %+v, want the write of 8", io)
	}
	if n := signals(t, fd); n != 2 {
		t.Errorf("%d signals, want 2", n)
	}
	match.Flags |= IOEventFDDeassign
	check(t, vm.IOEventFD(match))
	g.next(t, ExitIO)
	wantErr(t, vm.IOEventFD(match), unix.ENOENT,
		"KVM_IOEVENTFD address 0x20 length 1 eventfd "+decimal(fd)+" flags 0x7: no such file or directory")
}
