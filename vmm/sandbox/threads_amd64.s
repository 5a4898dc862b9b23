#include "textflag.h"

// func onThread()
// The kernel calls it on a thread that gets the signal of eachThread. It makes the calls that
// are prepared and then says which thread it was. It runs on the thread's signal stack, of
// which it uses nothing, and changes nothing that the Go runtime has: registers are restored
// by the return.
TEXT ·onThread(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	LEAQ	·threadCalls(SB), R12
	MOVQ	·threadCallCount(SB), R13
next:
	TESTQ	R13, R13
	JZ	done
	MOVQ	0(R12), AX		// struct threadCall
	MOVQ	8(R12), DI
	MOVQ	16(R12), SI
	MOVQ	24(R12), DX
	XORL	R10, R10
	XORL	R8, R8
	XORL	R9, R9
	SYSCALL
	CMPQ	AX, $-4095
	JCS	fine			// unsigned: below the error numbers
	NEGQ	AX
	MOVQ	AX, 32(R12)
fine:
	ADDQ	$40, R12
	DECQ	R13
	JMP	next
done:
	MOVL	$186, AX		// gettid
	SYSCALL
	MOVL	$1, BX
	LOCK
	XADDL	BX, ·threadsDone(SB)
	CMPL	BX, $4096		// const mostThreads
	JCC	full
	LEAQ	·threadsDoneIDs(SB), CX
	MOVL	AX, (CX)(BX*4)
full:
	RET				// to afterThread

// func afterThread()
TEXT ·afterThread(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	MOVL	$15, AX			// rt_sigreturn
	SYSCALL
	INT	$3

// func onThreadPC() uintptr
TEXT ·onThreadPC(SB), NOSPLIT, $0-8
	LEAQ	·onThread(SB), AX
	MOVQ	AX, ret+0(FP)
	RET

// func afterThreadPC() uintptr
TEXT ·afterThreadPC(SB), NOSPLIT, $0-8
	LEAQ	·afterThread(SB), AX
	MOVQ	AX, ret+0(FP)
	RET
