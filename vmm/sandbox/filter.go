package sandbox

import (
	"fmt"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// rule allows one system call, if all checks of one of its alternatives hold. A rule
// without alternatives allows it always, or has it fail with errno.
type rule struct {
	call  string
	any   []alternative
	errno syscall.Errno
}

type alternative []check

// check looks at one argument, whose upper 32 bits must be zero: it must be one of the
// values, and have none of the bits.
type check struct {
	arg    uint32
	values []uint32
	none   uint32
}

// Offsets in struct seccomp_data, and what is not in package unix.
const (
	dataNumber, dataArch, dataArgs = 0, 4, 16
	// x32 marks the calls of an interface that has the same architecture.
	x32 = 0x40000000
)

// assemble makes a program for seccomp(2) of rules, the most frequent ones first; other
// calls end in otherwise, one of the actions of seccomp(2).
func assemble(rules []rule, otherwise uint32) ([]bpf.RawInstruction, error) {
	a := &assembler{back: make([]bpf.RawInstruction, 0, 1024)}
	next := a.add(opReturn, otherwise)
	for _, r := range slices.Backward(rules) {
		n := slices.Index(names[:numbers], r.call)
		if n < 0 {
			return nil, fmt.Errorf("system call %s is unknown", r.call)
		}
		switch {
		case r.errno != 0:
			a.add(opReturn, unix.SECCOMP_RET_ERRNO|uint32(r.errno))
		case r.any == nil:
			a.add(opReturn, unix.SECCOMP_RET_ALLOW)
		default: // there is no other rule for this call
			a.add(opReturn, otherwise)
		}
		for _, alt := range slices.Backward(r.any) {
			alt.assemble(a)
		}
		next = a.jump(opEqual, uint32(n), a.first(), next)
	}
	refuse := a.add(opReturn, otherwise)
	a.jump(opAtMost, x32, refuse, next)
	known := a.add(opLoad, dataNumber)
	refuse = a.add(opReturn, otherwise)
	a.jump(opEqual, unix.AUDIT_ARCH_X86_64, known, refuse)
	a.add(opLoad, dataArch)
	return a.program(), nil
}

// assemble returns from the program if the checks hold, and goes on behind it otherwise.
func (alt alternative) assemble(a *assembler) {
	fails := a.first()
	holds := a.add(opReturn, unix.SECCOMP_RET_ALLOW)
	for _, c := range slices.Backward(alt) {
		for i, v := range slices.Backward(c.values) {
			other := fails
			if i < len(c.values)-1 {
				other = a.first()
			}
			a.jump(opEqual, v, holds, other)
		}
		if c.none != 0 {
			a.jump(opBits, c.none, fails, a.first())
		}
		low := dataArgs + 8*c.arg // little endian
		a.add(opLoad, low)
		a.jump(opEqual, 0, a.first(), fails)
		holds = a.add(opLoad, low+4)
	}
}

// filterCalls filters the system calls of all threads.
func (p Policy) filterCalls(s *Status) error {
	if err := supported(); err != nil {
		return p.lacks(s, "seccomp", err, "system calls are not filtered")
	}
	onVCPU := uint32(unix.SECCOMP_RET_TRAP)
	if p.Mode == Log {
		onVCPU = unix.SECCOMP_RET_LOG // to the kernel's log: a thread can have one listener
		if err := p.listen(); err != nil {
			return err
		}
	} else {
		if err := catch(); err != nil {
			return err
		}
		program, err := assemble(p.rules(), unix.SECCOMP_RET_TRAP)
		if err != nil {
			return err
		}
		if _, err := install(program, unix.SECCOMP_FILTER_FLAG_TSYNC); err != nil {
			return err
		}
	}
	program, err := assemble(vcpuRules(), onVCPU)
	if err != nil {
		return err
	}
	narrow = program
	s.Seccomp = true
	return nil
}

// supported reports why there is no seccomp(2): it refuses flags of its strict mode.
func supported() error {
	_, _, errno := syscall.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_STRICT, 1, 0)
	if errno == unix.EINVAL {
		return nil
	}
	return errno
}

// install gives the calling thread a filter, and all others with the flag for that.
func install(program []bpf.RawInstruction, flags uintptr) (fd int, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("PR_SET_NO_NEW_PRIVS: %w", err)
	}
	return load(program, flags)
}

// load makes the system call itself.
func load(program []bpf.RawInstruction, flags uintptr) (fd int, err error) {
	prog := &struct {
		len    uint16
		filter *bpf.RawInstruction
	}{uint16(len(program)), &program[0]} // struct sock_fprog
	n, _, errno := syscall.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(prog)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: install a filter of %d instructions: %w", len(program), errno)
	}
	if flags&unix.SECCOMP_FILTER_FLAG_NEW_LISTENER == 0 && n != 0 { // of TSYNC
		return -1, fmt.Errorf("seccomp: thread %d has a filter of its own", n)
	}
	return int(n), nil
}

// narrow is the filter of vCPU threads; nil: the process is in no cage.
var narrow []bpf.RawInstruction

// NarrowVCPU takes from the calling thread what a thread that runs a vCPU does not need,
// if the process is in the cage; otherwise it does nothing. The caller has locked its
// goroutine to the thread and never unlocks it, so that the thread ends with the goroutine:
// Go starts no other thread from such a one, and no other goroutine runs on it.
func NarrowVCPU() error {
	if current.Load() == nil || narrow == nil {
		return nil
	}
	if _, err := load(narrow, 0); err != nil {
		return fmt.Errorf("narrow the sandbox for a vCPU: %w", err)
	}
	return nil
}
