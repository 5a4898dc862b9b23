package kvm

import (
	"errors"
	"sync"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// apiVersion is the only version that applications must accept
// (Documentation/virt/kvm/api.rst, 4.1).
const apiVersion = 12

// devicePath is KVM's device node.
const devicePath = "/dev/kvm"

// System is an open /dev/kvm.
type System struct {
	h handle
}

// Open opens /dev/kvm and checks its API version. The error matches unix.ENOENT if
// there is no such device, unix.EACCES if access is denied.
func Open() (*System, error) {
	var fd int
	for {
		var err error
		fd, err = unix.Open(devicePath, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, opError(err, "open", devicePath)
		}
	}
	return systemOf(fd)
}

// systemOf checks the API version of fd, which it takes over.
func systemOf(fd int) (*System, error) {
	s := &System{}
	s.h.init(fd)
	version, err := s.version()
	if err == nil && version != apiVersion {
		err = opError(unsupported("expected version %d, got %d", apiVersion, version), "KVM_GET_API_VERSION", devicePath)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

var shared struct {
	openMu sync.Mutex // guards system
	system *System    // nil: not opened yet
}

// Shared returns the System that all machines of this process use. The first call opens
// it, and it stays open to the end of the process: a machine that is made later, in a
// sandbox or without the rights of the beginning, need not open /dev/kvm. Nobody may
// close it.
func Shared() (*System, error) {
	shared.openMu.Lock()
	defer shared.openMu.Unlock()
	if shared.system == nil {
		s, err := Open()
		if err != nil {
			return nil, err
		}
		shared.system = s
	}
	return shared.system, nil
}

// Close closes /dev/kvm. VMs created with it remain usable.
func (s *System) Close() error {
	return opError(s.h.close(), "close", devicePath)
}

func (s *System) version() (int, error) {
	n, err := again(func() (uintptr, error) { return gokvm.GetAPIVersion(s.h.raw()) })
	return n, opError(err, "KVM_GET_API_VERSION", devicePath)
}

// CheckExtension returns the capability's value: 0 if this kernel does not have
// it, otherwise 1 or a number that depends on the capability. The value for a VM
// may differ, see [VM.CheckExtension].
func (s *System) CheckExtension(c Capability) (int, error) {
	return s.h.checkExtension(c, devicePath)
}

func (h *handle) checkExtension(c Capability, what string) (int, error) {
	n, err := again(func() (uintptr, error) { return gokvm.CheckExtension(h.raw(), c) })
	return n, opError(err, "KVM_CHECK_EXTENSION", "%s %v", what, c)
}

// vcpuMmapSize returns the size in bytes of the area that a vCPU shares with the
// kernel.
func (s *System) vcpuMmapSize() (int, error) {
	n, err := again(func() (uintptr, error) { return gokvm.GetVCPUMMmapSize(s.h.raw()) })
	return n, opError(err, "KVM_GET_VCPU_MMAP_SIZE", devicePath)
}

// SupportedCPUID returns the CPUID leaves that this kernel supports for a guest on
// this processor.
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	c := &cpuid2{n: maxCPUIDEntries}
	if _, err := s.h.ioctl(reqGetSupportedCPUID, unsafe.Pointer(c)); err != nil {
		return nil, opError(err, "KVM_GET_SUPPORTED_CPUID", devicePath)
	}
	return c.list("KVM_GET_SUPPORTED_CPUID", devicePath)
}

// MSRIndexList returns the MSRs that the kernel can read and write for a guest.
// A saved vCPU must include them.
func (s *System) MSRIndexList() ([]uint32, error) {
	const op = "KVM_GET_MSR_INDEX_LIST"
	// struct kvm_msr_list is a count and as many indices. The first call gets the
	// count.
	for room := uint32(0); ; {
		list := make([]uint32, 1+room)
		list[0] = room
		_, err := s.h.ioctl(reqGetMSRIndexList, unsafe.Pointer(&list[0]))
		switch {
		case err == nil && list[0] <= room:
			return list[1 : 1+list[0]], nil
		case err == nil:
			return nil, opError(invalid("the kernel reports %d MSRs in a list of %d", list[0], room), op, devicePath)
		case errors.Is(err, unix.E2BIG) && list[0] > room && list[0] <= maxMSRList:
			room = list[0]
		default:
			return nil, opError(err, op, devicePath)
		}
	}
}

// CreateVM creates an empty VM.
func (s *System) CreateVM() (*VM, error) {
	size, err := s.vcpuMmapSize()
	if err != nil {
		return nil, err
	}
	fd, err := again(func() (uintptr, error) { return gokvm.CreateVM(s.h.raw()) })
	if err != nil {
		return nil, opError(err, "KVM_CREATE_VM", devicePath)
	}
	vm := &VM{vcpuMmapSize: size, slots: make(map[uint32]uint64)}
	vm.h.init(fd)
	return vm, nil
}
