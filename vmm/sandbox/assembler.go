package sandbox

import (
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// assembler makes a program for seccomp(2) from its end to its beginning: jumps only go
// forward, so what they go to is there already. It is a small one of its own, since the
// tables that ready-made ones look names up in cost each process 160 KiB and 0.2 ms.
type assembler struct {
	back []bpf.RawInstruction // the last instruction first
}

// place is an instruction, counted from the end of the program; the last one is 1.
type place int

// The instructions that are used (linux/bpf_common.h).
const (
	opLoad   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	opJump   = unix.BPF_JMP | unix.BPF_JA
	opEqual  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	opAtMost = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K // the value at most what was loaded
	opBits   = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
	opReturn = unix.BPF_RET | unix.BPF_K

	// farthest is how many instructions a conditional jump can skip.
	farthest = 255
)

// first is the instruction that was added last: where the program so far begins.
func (a *assembler) first() place { return place(len(a.back)) }

func (a *assembler) add(op uint16, k uint32) place {
	a.back = append(a.back, bpf.RawInstruction{Op: op, K: k})
	return a.first()
}

// skip is how many instructions one that is added now has to skip to reach a place.
func (a *assembler) skip(to place) uint32 { return uint32(a.first() - to) }

// jump adds a conditional jump. What is too far is reached by a jump of its own.
func (a *assembler) jump(op uint16, k uint32, yes, no place) place {
	if a.skip(yes) >= farthest {
		yes = a.add(opJump, a.skip(yes))
	}
	if a.skip(no) >= farthest {
		no = a.add(opJump, a.skip(no))
	}
	a.back = append(a.back, bpf.RawInstruction{Op: op, Jt: uint8(a.skip(yes)), Jf: uint8(a.skip(no)), K: k})
	return a.first()
}

// program returns what was added, in the order in which it runs.
func (a *assembler) program() []bpf.RawInstruction {
	p := make([]bpf.RawInstruction, 0, len(a.back))
	for i := len(a.back) - 1; i >= 0; i-- {
		p = append(p, a.back[i])
	}
	return p
}
