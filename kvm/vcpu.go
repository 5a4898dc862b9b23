package kvm

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// VCPU is one virtual processor.
type VCPU struct {
	h         handle
	id        int
	what      string // "vCPU 0", for errors
	xsaveSize int    // bytes of XSAVE state
	xsave2    bool   // the kernel has KVM_GET_XSAVE2

	// area is the mapping shared with the kernel: struct kvm_run, followed by the
	// data of port accesses. Only CreateVCPU and Close change it.
	area []byte

	ring dirtyRing // see CollectDirty

	// kickMu guards tid, and keeps area mapped while another thread kicks the
	// vCPU. It is not held in KVM_RUN.
	kickMu sync.Mutex
	tid    int // thread that runs the vCPU, 0 if none

	// These are for the thread that runs the vCPU, see sigbus.go.
	catches atomic.Bool // SIGBUS is kept for fault
	waits   [3]uint64   // arguments of rt_sigtimedwait
	siginfo [16]uint64  // siginfo_t
}

// Errors that Run returns for a kick. They are variables so that a kick does not
// allocate.
var (
	errInterrupted error = unix.EINTR
	errAgain       error = unix.EAGAIN
)

// immediateExitBit is kvm_run.immediate_exit within the first 32-bit word of
// struct kvm_run, little endian: the byte at offset 1.
const immediateExitBit = 1 << 8

// CreateVCPU creates the vCPU with this id, which is also its APIC id. Create the
// interrupt chips and set the identity map before.
func (vm *VM) CreateVCPU(id int) (*VCPU, error) {
	const op = "KVM_CREATE_VCPU"
	v := &VCPU{id: id, what: fmt.Sprintf("vCPU %d", id)}
	if id < 0 {
		return nil, opError(invalid("negative"), op, "%s", v.what)
	}
	size, err := vm.CheckExtension(gokvm.CapXSave2)
	if err != nil {
		return nil, err
	}
	v.xsave2, v.xsaveSize = size > 0, max(size, xsaveLegacySize)
	fd, err := again(func() (uintptr, error) { return gokvm.CreateVCPU(vm.h.raw(), id) })
	if err != nil {
		return nil, opError(err, op, "%s", v.what)
	}
	v.h.init(fd)
	if vm.vcpuMmapSize < int(unsafe.Sizeof(gokvm.RunData{})) {
		err = invalid("KVM_GET_VCPU_MMAP_SIZE is only %d bytes", vm.vcpuMmapSize)
	} else {
		v.area, err = unix.Mmap(fd, 0, vm.vcpuMmapSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		return nil, errors.Join(opError(err, "mmap", "kvm_run of %s", v.what), v.Close())
	}
	if err := v.mapRing(vm.ringBytes); err != nil {
		return nil, errors.Join(err, v.Close())
	}
	return v, nil
}

// Close closes the vCPU's descriptor and removes its mapping. No thread may be in
// Run or decode an exit. A later Kick or SetImmediateExit does nothing.
func (v *VCPU) Close() error {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	var err error
	if v.area != nil {
		err = opError(unix.Munmap(v.area), "munmap", "kvm_run of %s", v.what)
		v.area, v.tid = nil, 0
	}
	err = errors.Join(err, v.unmapRing())
	return errors.Join(err, opError(v.h.close(), "close", "%s", v.what))
}

// ID returns the id that it was created with.
func (v *VCPU) ID() int { return v.id }

// Run enters the guest once. It returns nil if the guest has exited, and
// [VCPU.ExitReason] says why; unix.EINTR if a signal or immediate exit ended it;
// unix.EAGAIN if a vCPU that waits for INIT was woken. After these two errors,
// which are not wrapped, the exit reason has no meaning and Run may be called
// again. Run allocates only for other errors. A page of the guest's that the host cannot
// access is a [*mempage.Fault] on a thread that is bound.
//
// The next Run completes the port or MMIO access of the last exit, also with
// immediate exit set.
func (v *VCPU) Run() error {
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, v.h.raw(), reqRun, 0)
	switch errno {
	case 0:
		return nil
	case unix.EINTR:
		if f := v.fault(); f != nil {
			return opError(f, "KVM_RUN", "%s", v.what)
		}
		return errInterrupted
	case unix.EAGAIN:
		return errAgain
	}
	return opError(errno, "KVM_RUN", "%s", v.what)
}

// SetImmediateExit makes every Run return unix.EINTR before it enters the guest,
// until it is cleared. It may be called from any thread. It does not end a Run
// that is already in the guest, see [VCPU.Kick].
func (v *VCPU) SetImmediateExit(on bool) {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	v.setImmediateExit(on)
}

// setImmediateExit stores the flag. The caller holds kickMu. Go has no atomic
// store of a byte. The other bytes of the word are request_interrupt_window and
// padding, which the kernel only reads; they do not change.
func (v *VCPU) setImmediateExit(on bool) {
	if v.area == nil {
		return
	}
	word := (*uint32)(unsafe.Pointer(unsafe.SliceData(v.area)))
	if on {
		atomic.OrUint32(word, immediateExitBit)
	} else {
		atomic.AndUint32(word, ^uint32(immediateExitBit))
	}
}

// BindThread tells Kick that the calling thread runs this vCPU. The goroutine
// must be locked to the thread (runtime.LockOSThread), and call UnbindThread
// before it unlocks it.
func (v *VCPU) BindThread() {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	v.tid = unix.Gettid()
	v.catchFaults()
}

// UnbindThread undoes BindThread, on the same thread. Afterwards Kick sends no
// signal, unless another thread has bound itself since.
func (v *VCPU) UnbindThread() {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	if v.tid == unix.Gettid() {
		v.tid = 0
		v.ignoreFaults()
	}
}

// Kick sets immediate exit and interrupts the bound thread, so that a Run in
// progress, and every later one, returns unix.EINTR until SetImmediateExit(false).
// The signal is SIGURG: Go's runtime handles it on every thread, and programs
// expect spurious ones.
//
// No kick is lost: Kick sets the flag before it sends the signal, so a thread that
// is about to enter the guest sees the flag or gets the signal.
func (v *VCPU) Kick() error {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	v.setImmediateExit(true)
	if v.tid == 0 {
		return nil
	}
	return opError(unix.Tgkill(unix.Getpid(), v.tid, unix.SIGURG), "tgkill", "thread %d of %s", v.tid, v.what)
}

// ThreadID is the kernel's number of the thread that runs the vCPU; 0: none is bound.
func (v *VCPU) ThreadID() int {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	return v.tid
}
