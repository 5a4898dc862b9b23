package memory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From include/uapi/linux/userfaultfd.h. The requests are exported by [FaultRequests] for
// the sandbox.
const (
	uffdNew        = 0x0000aa00 // USERFAULTFD_IOC_NEW, of /dev/userfaultfd
	uffdAPI        = 0xc018aa3f
	uffdRegister   = 0xc020aa00
	uffdUnregister = 0x8010aa01
	uffdWake       = 0x8010aa02
	uffdCopy       = 0xc028aa03
	uffdZeroPage   = 0xc020aa04
	uffdContinue   = 0xc020aa07

	uffdVersion      = 0xaa
	featureShmem     = 1 << 5 // UFFD_FEATURE_MISSING_SHMEM
	featureThreadID  = 1 << 8
	featureHuge      = 1<<4 | 1<<9 // UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MINOR_HUGETLBFS
	featureExact     = 1 << 11     // UFFD_FEATURE_EXACT_ADDRESS: not used, but of Linux 5.18, as is MADV_DONTNEED of huge pages
	registerMissing  = 1 << 0
	registerMinor    = 1 << 2
	eventPageFault   = 0x12
	faultMessageSize = 32
)

// FaultRequests are the ioctls that [Missing] makes.
func FaultRequests() []uint32 {
	return []uint32{uffdNew, uffdAPI, uffdRegister, uffdUnregister, uffdWake, uffdCopy, uffdZeroPage, uffdContinue}
}

// uffd is a userfaultfd of this process, which reports faults of the kernel, too: KVM's
// are such.
type uffd struct {
	fd   int
	huge bool // memory of huge pages can be registered
}

// spareFaults keeps a userfaultfd that is open and not in use.
var spareFaults struct {
	spareMu sync.Mutex // guards the fields below
	fd      uffd
	has     bool
	failed  error // of the system call, which is made once: a process may be in a sandbox later
}

// faultDevice opens the device, which stays open to the end of the process, for the same reason.
var faultDevice = sync.OnceValues(func() (int, error) {
	fd, err := unix.Open("/dev/userfaultfd", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/userfaultfd: %w", err)
	}
	return fd, nil
})

// PrepareMissing opens what memory that comes later needs, for a process that will be in a
// sandbox then. Its error says what is needed and is not there; so does that of
// [CheckMissing].
func PrepareMissing() error {
	f, err := takeFaults()
	if err != nil {
		return err
	}
	f.giveBack()
	return nil
}

// takeFaults returns a userfaultfd: by the device, to which a user can be admitted by its
// mode, or by the system call.
func takeFaults() (uffd, error) {
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK
	s := &spareFaults
	s.spareMu.Lock()
	defer s.spareMu.Unlock()
	if s.has {
		s.has = false
		return s.fd, nil
	}
	dev, err := faultDevice()
	if err == nil {
		fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), uffdNew, flags)
		if errno == 0 {
			return uffd{fd: int(fd)}.negotiate()
		}
		err = fmt.Errorf("USERFAULTFD_IOC_NEW: %w", errno)
	}
	if s.failed == nil {
		fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, flags, 0, 0)
		if errno == 0 {
			s.failed = errors.New("userfaultfd is in use already")
			return uffd{fd: int(fd)}.negotiate()
		}
		s.failed = fmt.Errorf("memory that comes later needs userfaultfd with faults of the kernel: let the user of this process open /dev/userfaultfd, "+
			"or have CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd to 1: %w; userfaultfd: %w", err, errno)
	}
	return uffd{}, s.failed
}

// giveBack keeps a userfaultfd with which nothing is registered any more.
func (u uffd) giveBack() {
	s := &spareFaults
	s.spareMu.Lock()
	defer s.spareMu.Unlock()
	if s.has {
		_ = unix.Close(u.fd)
		return
	}
	s.fd, s.has = u, true
}

// negotiate makes a new userfaultfd one that can be used.
func (u uffd) negotiate() (uffd, error) {
	type api struct{ api, features, ioctls uint64 }
	arg := api{uffdVersion, featureShmem | featureThreadID | featureHuge, 0}
	err := u.ioctl(uffdAPI, unsafe.Pointer(&arg))
	if u.huge = err == nil && arg.features&featureExact != 0; err != nil {
		arg = api{uffdVersion, featureShmem | featureThreadID, 0}
		err = u.ioctl(uffdAPI, unsafe.Pointer(&arg))
	}
	if err != nil {
		_ = unix.Close(u.fd)
		return uffd{}, fmt.Errorf("memory that comes later needs a userfaultfd with UFFD_FEATURE_MISSING_SHMEM and UFFD_FEATURE_THREAD_ID (Linux 4.14): %w", err)
	}
	return u, nil
}

func (u uffd) ioctl(request uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(u.fd), request, uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// span is struct uffdio_range.
type span struct{ start, length uint64 }

// register makes faults on pages that do not exist be reported; with registerMinor also
// those on pages that the file has and the page table has not.
func (u uffd) register(start uintptr, length, mode uint64) error {
	arg := struct {
		span
		mode, ioctls uint64
	}{span{uint64(start), length}, mode, 0}
	return u.ioctl(uffdRegister, unsafe.Pointer(&arg))
}

// unregister ends that, and lets all go on that wait.
func (u uffd) unregister(start uintptr, length uint64) error {
	arg := span{uint64(start), length}
	return u.ioctl(uffdUnregister, unsafe.Pointer(&arg))
}

// wake lets threads go on that wait for pages of a range: they look again.
func (u uffd) wake(start uintptr, length uint64) error {
	arg := span{uint64(start), length}
	return u.ioctl(uffdWake, unsafe.Pointer(&arg))
}

// place makes pages that do not exist, with their content, and lets all go on that wait for
// them. A page that exists is left as it is.
func (u uffd) place(start uintptr, content []byte) error {
	return u.fill(len(content), func(done uint64) (uint64, error) {
		arg := struct {
			dst, src, length, mode uint64
			copied                 int64
		}{uint64(start) + done, uint64(uintptr(unsafe.Pointer(&content[done]))), uint64(len(content)) - done, 0, 0}
		err := u.ioctl(uffdCopy, unsafe.Pointer(&arg))
		return uint64(max(arg.copied, 0)), err
	}, start)
}

// zero makes pages that do not exist read as zero.
func (u uffd) zero(start uintptr, length uint64) error {
	return u.fill(int(length), func(done uint64) (uint64, error) {
		arg := struct {
			span
			mode   uint64
			zeroed int64
		}{span{uint64(start) + done, length - done}, 0, 0}
		err := u.ioctl(uffdZeroPage, unsafe.Pointer(&arg))
		return uint64(max(arg.zeroed, 0)), err
	}, start)
}

// show puts a huge page of the file into the page table, and lets all go on that wait for it.
// One that is there is left as it is.
func (u uffd) show(start uintptr) error {
	for {
		arg := struct {
			span
			mode   uint64
			mapped int64
		}{span{uint64(start), hugePageSize}, 0, 0}
		err := u.ioctl(uffdContinue, unsafe.Pointer(&arg))
		switch {
		case errors.Is(err, unix.EEXIST):
			return u.wake(start, hugePageSize)
		case !errors.Is(err, unix.EAGAIN): // the process's mappings are changing
			return err
		}
	}
}

// fill repeats a step that makes some pages of a range. One that exists is left out, and
// who waits for it goes on.
func (u uffd) fill(length int, step func(done uint64) (uint64, error), start uintptr) error {
	for done := uint64(0); done < uint64(length); {
		n, err := step(done)
		done += n
		switch {
		case err == nil, n > 0: // what is left is tried by itself
		case errors.Is(err, unix.EAGAIN): // the process's mappings are changing
		case errors.Is(err, unix.EEXIST):
			if err := u.wake(start+uintptr(done), pageBytes); err != nil {
				return err
			}
			done += pageBytes
		default:
			return err
		}
	}
	return nil
}

// fault is a fault that was reported.
type fault struct {
	addr   uintptr
	thread uint32
}

// read returns faults that have been reported, or none after it was woken by the eventfd.
func (u uffd) read(wake int, buf []byte, out []fault) ([]fault, error) {
	fds := []unix.PollFd{{Fd: int32(u.fd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
		if fds[1].Revents != 0 {
			return nil, nil
		}
		n, err := unix.Read(u.fd, buf)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = out[:0]
		for b := buf[:n]; len(b) >= faultMessageSize; b = b[faultMessageSize:] {
			if b[0] == eventPageFault {
				out = append(out, fault{uintptr(binary.NativeEndian.Uint64(b[16:])), binary.NativeEndian.Uint32(b[24:])})
			}
		}
		if len(out) > 0 {
			return out, nil
		}
	}
}
