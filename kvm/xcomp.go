package kvm

import (
	"syscall"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// arch_prctl codes of asm/prctl.h (Documentation/arch/x86/xstate.rst).
const (
	archGetXCompGuestPerm = 0x1024
	archReqXCompGuestPerm = 0x1025
)

// Device attribute of /dev/kvm (asm/kvm.h).
const (
	systemGroup    = 0
	xcompGuestSupp = 0 // KVM_X86_XCOMP_GUEST_SUPP
)

// xfeatureTileData is the XSAVE component of AMX's tiles, which a process has to
// request.
const xfeatureTileData = 18

// RequestXComp asks the kernel for the permission to use every XSAVE component
// that KVM supports in guests, including large ones (AMX tiles). It returns the
// permitted components as a mask with XCR0's bits, or 0 if the kernel has no such
// call. The permission is the process's. Call it before the first vCPU is created,
// also at the destination of a migration: it determines the size of the XSAVE
// state.
func (s *System) RequestXComp() (uint64, error) {
	has, err := s.CheckExtension(gokvm.CapSysAttributes)
	if err != nil || has == 0 {
		return 0, err
	}
	supported, err := s.h.getAttr(systemGroup, xcompGuestSupp)
	if err != nil {
		return 0, opError(err, "KVM_GET_DEVICE_ATTR", "%s XCOMP_GUEST_SUPP", devicePath)
	}
	var permitted uint64
	_, _, errno := syscall.Syscall(unix.SYS_ARCH_PRCTL, archGetXCompGuestPerm, uintptr(unsafe.Pointer(&permitted)), 0)
	if errno != 0 {
		return 0, opError(errno, "ARCH_GET_XCOMP_GUEST_PERM", "process")
	}
	if (supported&^permitted)&(1<<xfeatureTileData) == 0 {
		return permitted, nil
	}
	_, _, errno = syscall.Syscall(unix.SYS_ARCH_PRCTL, archReqXCompGuestPerm, xfeatureTileData, 0)
	if errno != 0 {
		return permitted, opError(errno, "ARCH_REQ_XCOMP_GUEST_PERM", "component %d", xfeatureTileData)
	}
	return permitted | 1<<xfeatureTileData, nil
}
