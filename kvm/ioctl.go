package kvm

import (
	"errors"
	"sync/atomic"
	"syscall"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// ioctl numbers of linux/kvm.h, except those of the calls that are made through
// gokvm.
var (
	// On /dev/kvm.
	reqGetMSRIndexList   = gokvm.IIOWR(0x02, 4)
	reqGetSupportedCPUID = gokvm.IIOWR(0x05, cpuidHeaderSize)

	// On a VM.
	reqGetDirtyLog         = gokvm.IIOW(0x42, unsafe.Sizeof(dirtyLog{}))
	reqSetUserMemoryRegion = gokvm.IIOW(0x46, unsafe.Sizeof(gokvm.UserspaceMemoryRegion{}))
	reqSetIdentityMapAddr  = gokvm.IIOW(0x48, 8)
	reqGetIRQChip          = gokvm.IIOWR(0x62, unsafe.Sizeof(IRQChip{}))
	reqSetIRQChip          = gokvm.IIOR(0x63, unsafe.Sizeof(IRQChip{})) // _IOR in the kernel too
	reqIRQLine             = gokvm.IIOW(0x61, unsafe.Sizeof(irqLevel{}))
	reqSetGSIRouting       = gokvm.IIOW(0x6a, irqRoutingHeaderSize)
	reqIRQFD               = gokvm.IIOW(0x76, unsafe.Sizeof(irqfd{}))
	reqCreatePIT2          = gokvm.IIOW(0x77, unsafe.Sizeof(pitConfig{}))
	reqIOEventFD           = gokvm.IIOW(0x79, unsafe.Sizeof(ioeventfd{}))
	reqSetClock            = gokvm.IIOW(0x7b, unsafe.Sizeof(ClockData{}))
	reqGetClock            = gokvm.IIOR(0x7c, unsafe.Sizeof(ClockData{}))
	reqGetPIT2             = gokvm.IIOR(0x9f, unsafe.Sizeof(PITState2{}))
	reqSetPIT2             = gokvm.IIOW(0xa0, unsafe.Sizeof(PITState2{}))
	reqEnableCap           = gokvm.IIOW(0xa3, unsafe.Sizeof(enableCap{}))
	reqSignalMSI           = gokvm.IIOW(0xa5, unsafe.Sizeof(msi{}))
	reqClearDirtyLog       = gokvm.IIOWR(0xc0, unsafe.Sizeof(clearDirtyLog{}))
	reqResetDirtyRings     = gokvm.IIO(0xc7)

	// On a vCPU.
	reqRun           = gokvm.IIO(0x80)
	reqGetRegs       = gokvm.IIOR(0x81, unsafe.Sizeof(Regs{}))
	reqSetRegs       = gokvm.IIOW(0x82, unsafe.Sizeof(Regs{}))
	reqGetSregs      = gokvm.IIOR(0x83, unsafe.Sizeof(Sregs{}))
	reqSetSregs      = gokvm.IIOW(0x84, unsafe.Sizeof(Sregs{}))
	reqTranslate     = gokvm.IIOWR(0x85, unsafe.Sizeof(Translation{}))
	reqGetMSRs       = gokvm.IIOWR(0x88, msrHeaderSize)
	reqSetMSRs       = gokvm.IIOW(0x89, msrHeaderSize)
	reqSetSignalMask = gokvm.IIOW(0x8b, unsafe.Sizeof(signalMask{}.length))
	reqGetLAPIC      = gokvm.IIOR(0x8e, unsafe.Sizeof(LAPICState{}))
	reqSetLAPIC      = gokvm.IIOW(0x8f, unsafe.Sizeof(LAPICState{}))
	reqSetCPUID2     = gokvm.IIOW(0x90, cpuidHeaderSize)
	reqGetCPUID2     = gokvm.IIOWR(0x91, cpuidHeaderSize)
	reqGetMPState    = gokvm.IIOR(0x98, unsafe.Sizeof(gokvm.MPState{}))
	reqSetMPState    = gokvm.IIOW(0x99, unsafe.Sizeof(gokvm.MPState{}))
	reqGetVCPUEvents = gokvm.IIOR(0x9f, unsafe.Sizeof(VCPUEvents{}))
	reqSetVCPUEvents = gokvm.IIOW(0xa0, unsafe.Sizeof(VCPUEvents{}))
	reqGetDebugRegs  = gokvm.IIOR(0xa1, unsafe.Sizeof(DebugRegs{}))
	reqSetDebugRegs  = gokvm.IIOW(0xa2, unsafe.Sizeof(DebugRegs{}))
	reqGetXSAVE      = gokvm.IIOR(0xa4, xsaveLegacySize)
	reqSetXSAVE      = gokvm.IIOW(0xa5, xsaveLegacySize)
	reqGetXCRS       = gokvm.IIOR(0xa6, unsafe.Sizeof(XCRS{}))
	reqSetXCRS       = gokvm.IIOW(0xa7, unsafe.Sizeof(XCRS{}))
	reqKVMClockCtrl  = gokvm.IIO(0xad)
	reqGetSregs2     = gokvm.IIOR(0xcc, unsafe.Sizeof(Sregs2{}))
	reqSetSregs2     = gokvm.IIOW(0xcd, unsafe.Sizeof(Sregs2{}))
	reqGetXSAVE2     = gokvm.IIOR(0xcf, xsaveLegacySize)

	// On anything that has device attributes.
	reqSetDeviceAttr = gokvm.IIOW(0xe1, unsafe.Sizeof(deviceAttr{}))
	reqGetDeviceAttr = gokvm.IIOW(0xe2, unsafe.Sizeof(deviceAttr{}))
	reqHasDeviceAttr = gokvm.IIOW(0xe3, unsafe.Sizeof(deviceAttr{}))
)

// handle is an open KVM file descriptor. After close it is -1, so that a late
// call fails with EBADF and cannot reach another file with the same number.
type handle struct {
	fd atomic.Int64
}

// init takes ownership of the descriptor.
func (h *handle) init(fd int) { h.fd.Store(int64(fd)) }

// raw returns the descriptor, or an invalid one after close.
func (h *handle) raw() uintptr { return uintptr(h.fd.Load()) }

// close closes the descriptor; a second call does nothing.
func (h *handle) close() error {
	fd := h.fd.Swap(-1)
	if fd < 0 {
		return nil
	}
	return unix.Close(int(fd))
}

// ioctl makes one call, and repeats it if a signal interrupts it. arg points to
// what the kernel reads or writes, or is nil. The conversion to uintptr must be in
// the expression of the system call: only there the compiler keeps the object
// alive and in its place. The error is nil or a syscall.Errno.
func (h *handle) ioctl(req uintptr, arg unsafe.Pointer) (int, error) {
	for {
		n, _, errno := syscall.Syscall(syscall.SYS_IOCTL, h.raw(), req, uintptr(arg))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// again makes a call of gokvm, and repeats it if a signal interrupts it.
func again(call func() (uintptr, error)) (int, error) {
	for {
		n, err := call()
		if err == nil {
			return int(n), nil
		}
		if !errors.Is(err, unix.EINTR) {
			return 0, err
		}
	}
}

// deviceAttr is struct kvm_device_attr. addr is a pointer, so that the garbage
// collector and a moving stack see it.
type deviceAttr struct {
	flags uint32
	group uint32
	attr  uint64
	addr  unsafe.Pointer
}

// getAttr reads one 64-bit device attribute.
func (h *handle) getAttr(group uint32, attr uint64) (uint64, error) {
	value := new(uint64)
	a := &deviceAttr{group: group, attr: attr, addr: unsafe.Pointer(value)}
	_, err := h.ioctl(reqGetDeviceAttr, unsafe.Pointer(a))
	return *value, err
}

// setAttr writes one 64-bit device attribute.
func (h *handle) setAttr(group uint32, attr, value uint64) error {
	a := &deviceAttr{group: group, attr: attr, addr: unsafe.Pointer(&value)}
	_, err := h.ioctl(reqSetDeviceAttr, unsafe.Pointer(a))
	return err
}

// hasAttr says whether the attribute exists.
func (h *handle) hasAttr(group uint32, attr uint64) bool {
	a := &deviceAttr{group: group, attr: attr}
	_, err := h.ioctl(reqHasDeviceAttr, unsafe.Pointer(a))
	return err == nil
}
