/*
 * Ring 0, second part: interrupts and traps, in assembly only. It never stores r13, r14 or r15, so the counters that
 * pages are checked against stay in registers also while an interrupt is handled.
 */
#include "layout.h"

	.text
	.balign 16
	.globl vector_stubs
vector_stubs: /* 16 bytes for each vector */
	.set vector, 0
	.rept 32
	.balign 16
	/* the CPU pushes an error code for 8, 10 to 14, 17, 21, 29 and 30 (SDM 3, table 6-1; APM 2, 8.2) */
	.if !((1 << vector) & 0x60227d00)
	pushq $0
	.endif
	pushq $vector
	jmp trap
	.set vector, vector + 1
	.endr
	.rept VECTORS - 32
	.balign 16
	.if vector == VEC_SPURIOUS
	iretq /* no EOI for a spurious interrupt (SDM 3, 11.9) */
	.elseif vector == VEC_SERIAL
	movb $1, serial_interrupted
	jmp interrupt
	.elseif vector >= VEC_DEVICES && vector < VEC_DEVICES + DEVICE_VECTORS
	addl $1, device_interrupts + 4 * (vector - VEC_DEVICES) /* only CPU 0 gets them */
	jmp interrupt
	.else
	jmp interrupt
	.endif
	.set vector, vector + 1
	.endr
	.balign 16

/* An interrupt only sets CPU_WOKEN; ring 3 finds the reason. */
interrupt:
	pushq %rax
	movq %rsp, %rax
	andq $-CPU_PAGE, %rax
	movb $1, CPU_WOKEN(%rax)
	movl $LAPIC_EOI, %eax
	movl $0, (%rax)
	popq %rax
	iretq

/* On the stack: vector, error code, RIP, CS, RFLAGS, RSP, SS. */
trap:
	cmpl $6, (%rsp)
	jne fatal
	cmpq $service_ud2, 16(%rsp)
	jne fatal
	cmpl $SERVICE_KVMCLOCK, %eax
	je kvmclock
	cmpl $SERVICE_SLEEP, %eax
	jne triple_fault

	/*
	 * Sleep until an interrupt, unless one has come since the last sleep ended: ring 3 may have looked for work before
	 * it. Interrupts are off here, and STI takes effect after HLT has begun.
	 */
	movq %rsp, %rax
	andq $-CPU_PAGE, %rax
	cmpb $0, CPU_WOKEN(%rax)
	jne 1f
	sti
	hlt
	cli
1:	movb $0, CPU_WOKEN(%rax)
served:	addq $16, %rsp
	addq $2, (%rsp) /* after the UD2 */
	iretq

kvmclock:
	movl $0x4b564d01, %ecx /* MSR_KVM_SYSTEM_TIME_NEW */
	movl %esi, %eax
	xorl %edx, %edx
	wrmsr
	jmp served

/*
 * Any other trap: trap_report prints it, in ring 3 with interrupts off, and requests the triple fault. Another trap on
 * the same CPU causes the triple fault without a report; a trap on another CPU stops that CPU.
 */
fatal:
	movq %rsp, %rax
	andq $-CPU_PAGE, %rax
	cmpl %eax, dying
	je triple_fault
	cmpl $0, dying
	jne 2f
	movl %eax, dying
	movq %rsp, %rdi
	movq %cr2, %rsi
	pushq $SEL_USER_DATA
	pushq $trap_stack_end - 8
	pushq $0x3002 /* interrupts off, IOPL 3 */
	pushq $SEL_USER_CODE
	pushq $trap_report
	iretq
2:	cli
	hlt
	jmp 2b

/* A page fault (nothing is mapped above 512 GiB) without an IDT. */
triple_fault:
	lidt no_idt
	movabsq $0x00007ffffffff000, %rax
	movb (%rax), %al
	jmp triple_fault

/* void service(unsigned number, unsigned value): the only intended entry from ring 3 to ring 0. */
	.globl service, service_ud2
service:
	movl %edi, %eax
service_ud2:
	ud2
	ret

	.section .rodata
	.balign 8
no_idt:	.word 0
	.quad 0

	.bss
	.globl serial_interrupted, dying, device_interrupts
device_interrupts:
	.skip 4 * DEVICE_VECTORS
serial_interrupted:
	.skip 1
	.balign 4
dying:	.skip 4 /* address of the CPU page of the CPU that reports a trap; 0: none */
	.balign 16
	.skip 8192
trap_stack_end:

	.section .note.GNU-stack, "", @progbits
