package sandbox

import (
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What the handler of SIGSYS in trap_amd64.s uses. It is set before the filter is there.
var (
	//lint:ignore U1000 by the handler
	trapping uint32
	// line is what is printed: words, a name, words.
	line [3]unix.Iovec
	//lint:ignore U1000 by the handler
	stderr = unix.PollFd{Fd: 2, Events: unix.POLLOUT}
)

const (
	lineBegin = "govmm: sandbox: the system call "
	lineEnd   = " is not allowed here: the process ends (docs/security.md)\n"
)

//lint:ignore U1000 by trappedPC
func trapped()
func trappedPC() uintptr

// catch installs the handler. Go's own, which the runtime has for every signal, would
// take the signal for a fault of the runtime and print all goroutines' stacks.
func catch() error {
	for i, s := range []string{0: lineBegin, 2: lineEnd} {
		line[i] = unix.Iovec{Base: unsafe.StringData(s), Len: uint64(len(s))}
	}
	// struct sigaction of the kernel. The handler does not return, so nothing is
	// restored; but the kernel wants an address for it.
	const sigInfo, onStack, restorer = 0x4, 0x08000000, 0x04000000
	action := &struct {
		handler, flags, restorer uintptr
		mask                     uint64
	}{trappedPC(), sigInfo | onStack | restorer, trappedPC(), ^uint64(0)}
	if _, _, errno := syscall.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGSYS), uintptr(unsafe.Pointer(action)), 0, 8, 0, 0); errno != 0 {
		return fmt.Errorf("sigaction SIGSYS: %w", errno)
	}
	return nil
}
