package sandbox

import (
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
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

// assemble makes a program for seccomp(2) of rules, the most frequent ones first; other
// calls end in otherwise. It is built from the parts of go-seccomp-bpf's assembler and not
// by its Policy, which has lost the call's number when the checks of arguments have
// failed, and looks for a rule by what it then holds.
func assemble(rules []rule, otherwise seccomp.Action) ([]bpf.RawInstruction, error) {
	info := arch.X86_64
	const number, architecture = 0, 4 // in struct seccomp_data
	refuse := bpf.RetConstant{Val: uint32(otherwise)}
	head := []bpf.Instruction{
		bpf.LoadAbsolute{Off: architecture, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(info.ID), SkipTrue: 1},
		refuse,
		bpf.LoadAbsolute{Off: number, Size: 4},
		// Calls of the x32 interface have the same architecture.
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: uint32(arch.X32.SeccompMask), SkipTrue: 1},
		refuse,
	}
	p := seccomp.NewProgram()
	for _, r := range rules {
		n, ok := info.SyscallNames[r.call]
		if !ok {
			return nil, fmt.Errorf("system call %s is unknown", r.call)
		}
		next := p.NewLabel()
		p.JmpIfTrue(bpf.JumpNotEqual, uint32(n), next)
		for _, a := range r.any {
			a.assemble(&p)
		}
		switch {
		case r.errno != 0:
			p.Ret(seccomp.ActionErrno | seccomp.Action(r.errno))
		case r.any == nil:
			p.Ret(seccomp.ActionAllow)
		default: // there is no other rule for this call
			p.Ret(otherwise)
		}
		p.SetLabel(next)
	}
	p.Ret(otherwise)
	tail, err := p.Assemble()
	if err != nil {
		return nil, err
	}
	return bpf.Assemble(append(head, tail...))
}

// assemble returns from the program if the checks hold, and goes on behind it otherwise.
func (a alternative) assemble(p *seccomp.Program) {
	fails := p.NewLabel()
	for _, c := range a {
		p.LdHi(c.arg)
		p.JmpIfTrue(bpf.JumpNotEqual, 0, fails)
		p.LdLo(c.arg)
		if c.none != 0 {
			p.JmpIfTrue(bpf.JumpBitsSet, c.none, fails)
		}
		if len(c.values) > 0 {
			holds := p.NewLabel()
			last := len(c.values) - 1
			for _, v := range c.values[:last] {
				p.JmpIfTrue(bpf.JumpEqual, v, holds)
			}
			p.JmpIfTrue(bpf.JumpNotEqual, c.values[last], fails)
			p.SetLabel(holds)
		}
	}
	p.Ret(seccomp.ActionAllow)
	p.SetLabel(fails)
}

// filterCalls filters the system calls of all threads.
func (p Policy) filterCalls(s *Status) error {
	if !seccomp.Supported() {
		s.Missing = append(s.Missing, "seccomp (system calls are not filtered)")
		return nil
	}
	onVCPU := seccomp.ActionTrap
	if p.Mode == Log {
		onVCPU = seccomp.ActionLog // to the kernel's log: a thread can have one listener
		if err := p.listen(); err != nil {
			return err
		}
	} else {
		if err := catch(); err != nil {
			return err
		}
		program, err := assemble(p.rules(), seccomp.ActionTrap)
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
