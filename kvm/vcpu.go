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
	nested    int    // largest nested state in bytes, 0 if there is none

	// area is the mapping that the kernel shares: struct kvm_run, and behind it
	// the data of port accesses. Written by CreateVCPU and Close only.
	area []byte

	ring dirtyRing // see CollectDirty

	// kickMu guards, against Close and UnbindThread, what other threads touch to
	// kick the vCPU: tid, and area's being mapped. Not held in KVM_RUN.
	kickMu sync.Mutex
	tid    int // thread that runs the vCPU, 0 if none
}

// Errors that Run returns for a kick; made once, so that a kick does not allocate.
var (
	errInterrupted error = unix.EINTR
	errAgain       error = unix.EAGAIN
)

// immediateExitBit is kvm_run.immediate_exit within the first 32-bit word of
// struct kvm_run, little endian: the byte at offset 1.
const immediateExitBit = 1 << 8

// CreateVCPU makes the vCPU with this id, which is its APIC id too. Interrupt
// chips and the identity map are to be made before.
func (vm *VM) CreateVCPU(id int) (*VCPU, error) {
	const op = "KVM_CREATE_VCPU"
	v := &VCPU{id: id, what: fmt.Sprintf("vCPU %d", id)}
	if id < 0 {
		return nil, opError(invalid("negative"), op, "%s", v.what)
	}
	size, err := vm.CheckExtension(CapXSAVE2)
	if err != nil {
		return nil, err
	}
	v.xsave2, v.xsaveSize = size > 0, max(size, xsaveLegacySize)
	if v.nested, err = vm.CheckExtension(CapNestedState); err != nil {
		return nil, err
	}
	fd, err := again(func() (uintptr, error) { return gokvm.CreateVCPU(vm.h.raw(), id) })
	if err != nil {
		return nil, opError(err, op, "%s", v.what)
	}
	v.h.init(fd)
	if vm.vcpuMmapSize < int(unsafe.Sizeof(gokvm.RunData{})) {
		err = invalid("KVM_GET_VCPU_MMAP_SIZE said %d bytes", vm.vcpuMmapSize)
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

// Close frees the vCPU's descriptor and mapping. No thread may be in Run or look at an
// exit; a late Kick or SetImmediateExit does nothing.
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

// ID returns the id it was made with.
func (v *VCPU) ID() int { return v.id }

// Run enters the guest once. It returns nil when the guest exited and
// [VCPU.ExitReason] says why; unix.EINTR when a signal or immediate exit ended
// it, and unix.EAGAIN when a vCPU that waits for its start (INIT) was woken:
// then the exit reason says nothing, and Run may be called again. These two are
// returned bare. Run does not allocate but for other errors.
//
// A port or MMIO access of the last exit completes at the next Run, also when
// immediate exit is set.
func (v *VCPU) Run() error {
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, v.h.raw(), reqRun, 0)
	switch errno {
	case 0:
		return nil
	case unix.EINTR:
		return errInterrupted
	case unix.EAGAIN:
		return errAgain
	}
	return opError(errno, "KVM_RUN", "%s", v.what)
}

// SetImmediateExit makes the next Run return unix.EINTR before it enters the
// guest, for as long as it is set. It may be called from any thread; it does not
// end a Run that is in the guest already, see [VCPU.Kick].
func (v *VCPU) SetImmediateExit(on bool) {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	v.setImmediateExit(on)
}

// setImmediateExit stores the flag. The caller holds kickMu. Go has no atomic
// store of a byte; the neighbours in the word are request_interrupt_window and
// padding, which the kernel only reads, and they stay as they are.
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
// must be locked to it (runtime.LockOSThread), and call UnbindThread before it
// lets go of the thread.
func (v *VCPU) BindThread() {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	v.tid = unix.Gettid()
}

// UnbindThread ends what BindThread began; it is called on the same thread.
// Afterwards Kick sends no signal, unless another thread has bound itself since.
func (v *VCPU) UnbindThread() {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	if v.tid == unix.Gettid() {
		v.tid = 0
	}
}

// Kick sets immediate exit and interrupts the thread that was bound, so that a
// Run in progress, and every later one, returns unix.EINTR until
// SetImmediateExit(false). The signal is SIGURG: Go's runtime has a handler for
// it on every thread and programs expect stray ones.
//
// No kick is lost: the flag is set before the signal is sent, so a thread that is
// about to enter the guest sees one or the other.
func (v *VCPU) Kick() error {
	v.kickMu.Lock()
	defer v.kickMu.Unlock()
	v.setImmediateExit(true)
	if v.tid == 0 {
		return nil
	}
	return opError(unix.Tgkill(unix.Getpid(), v.tid, unix.SIGURG), "tgkill", "thread %d of %s", v.tid, v.what)
}
