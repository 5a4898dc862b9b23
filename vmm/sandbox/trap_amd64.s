#include "textflag.h"

// A process that may not go on must not depend on anything of it, the Go runtime least of
// all: this handler of SIGSYS uses no stack, takes no lock and allocates nothing.

// func trapped()
// The kernel calls it with a siginfo_t at SI. It prints one line and ends the process.
TEXT ·trapped(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	MOVL	24(SI), BX		// si_syscall
	MOVL	$1, AX
	XCHGL	AX, ·trapping(SB)
	TESTL	AX, AX
	JNZ	wait			// another thread is at it
	CMPL	BX, $512		// const numbers
	JCS	known
	MOVL	$512, BX
known:
	SHLQ	$4, BX			// sizeof(string)
	LEAQ	·names(SB), CX
	ADDQ	CX, BX
	CMPQ	8(BX), $0		// its length
	JNE	named
	LEAQ	8192(CX), BX		// the last name
named:
	MOVQ	0(BX), AX
	MOVQ	AX, ·line+16(SB)	// the second iovec
	MOVQ	8(BX), AX
	MOVQ	AX, ·line+24(SB)
	// A pipe that nobody reads must not keep the process: poll(&stderr, 1, 1000).
	LEAQ	·stderr(SB), DI
	MOVL	$1, SI
	MOVL	$1000, DX
	MOVL	$7, AX
	SYSCALL
	CMPQ	AX, $1
	JNE	exit
	MOVL	$2, DI			// writev(2, line, 3)
	LEAQ	·line(SB), SI
	MOVL	$3, DX
	MOVL	$20, AX
	SYSCALL
exit:
	MOVL	$1, DI			// exit_group(1)
	MOVL	$231, AX
	SYSCALL
wait:
	PAUSE
	JMP	wait

// func trappedPC() uintptr
TEXT ·trappedPC(SB), NOSPLIT, $0-8
	LEAQ	·trapped(SB), AX
	MOVQ	AX, ret+0(FP)
	RET
