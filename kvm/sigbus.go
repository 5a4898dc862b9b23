package kvm

import (
	"syscall"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// KVM sends SIGBUS to a vCPU's thread when its guest touches a page that the host
// cannot access (kvm_send_hwpoison_signal in virt/kvm/kvm_main.c). Go's runtime takes
// that for a fault of its own and ends the process. So the signal is blocked on that
// thread and let through in KVM_RUN only, which it then ends; it stays pending, and
// Run fetches it.

// signalMask is struct kvm_signal_mask with the signals of the kernel's sigset_t.
type signalMask struct {
	length uint32
	set    [8]byte
}

// sigset is the kernel's sigset_t with SIGBUS.
const sigset uint64 = 1 << (unix.SIGBUS - 1)

// catchFaults arranges it for the calling thread. Without it all is as before.
func (v *VCPU) catchFaults() {
	bus, before := unix.Sigset_t{}, unix.Sigset_t{}
	bus.Val[0] = sigset
	if unix.PthreadSigmask(unix.SIG_BLOCK, &bus, &before) != nil {
		return
	}
	mask := signalMask{length: 8}
	*(*[8]byte)(unsafe.Pointer(&mask.set)) = *(*[8]byte)(unsafe.Pointer(&before.Val[0]))
	if _, err := v.h.ioctl(reqSetSignalMask, unsafe.Pointer(&mask)); err != nil {
		_ = unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil)
		return
	}
	v.catches.Store(true)
}

// ignoreFaults undoes catchFaults, on the same thread.
func (v *VCPU) ignoreFaults() {
	bus := unix.Sigset_t{}
	bus.Val[0] = sigset
	_ = unix.PthreadSigmask(unix.SIG_UNBLOCK, &bus, nil)
	v.catches.Store(false)
}

// fault returns the fault of which KVM has told the calling thread, if there is one.
func (v *VCPU) fault() *mempage.Fault {
	if !v.catches.Load() {
		return nil
	}
	v.waits = [3]uint64{sigset} // and a timespec of 0
	n, _, errno := syscall.RawSyscall6(unix.SYS_RT_SIGTIMEDWAIT, uintptr(unsafe.Pointer(&v.waits[0])),
		uintptr(unsafe.Pointer(&v.siginfo)), uintptr(unsafe.Pointer(&v.waits[1])), unsafe.Sizeof(sigset), 0, 0)
	if errno != 0 || unix.Signal(n) != unix.SIGBUS {
		return nil
	}
	return &mempage.Fault{Addr: uintptr(v.siginfo[2])} // si_addr
}
