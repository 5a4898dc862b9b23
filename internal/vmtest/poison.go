package vmtest

import (
	"testing"
	"unsafe"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// Poison makes a page that was never touched one that the host cannot access, as if
// its memory had failed, by UFFDIO_POISON (Linux 6.6). It skips the test where that is
// not possible.
func Poison(t testing.TB, page []byte) {
	t.Helper()
	const (
		userModeOnly = 1
		apiVersion   = 0xaa
		ioctlAPI     = 0xc018aa3f
		register     = 0xc020aa00
		poison       = 0xc020aa08
	)
	fd, _, e := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|userModeOnly, 0, 0)
	if e != 0 {
		t.Skipf("SKIPPED: userfaultfd: %v", e)
	}
	defer unix.Close(int(fd))
	call := func(what string, request uintptr, arg *[4]uint64) {
		t.Helper()
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(arg))); e != 0 {
			t.Skipf("SKIPPED: userfaultfd, %s: %v", what, e)
		}
	}
	start, length := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(page)))), uint64(mempage.Size)
	call("UFFDIO_API", ioctlAPI, &[4]uint64{apiVersion, 1 << 14}) // UFFD_FEATURE_POISON
	call("UFFDIO_REGISTER", register, &[4]uint64{start, length, 1})
	call("UFFDIO_POISON", poison, &[4]uint64{start, length, 0})
}
