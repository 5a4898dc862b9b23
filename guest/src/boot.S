/*
 * Ring 0, first part: from the PVH entry (32-bit, paging off), or from an AP's real mode, to long mode and to ring 3. It
 * does as little as possible, because the demo guest also runs on KVMs that emulate ring 0 one instruction at a time.
 * Page tables and the GDT are data. C in ring 3 does everything that needs no privilege.
 */
#include "layout.h"

/* Xen's public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY is 18, its value the physical address of the 32-bit entry. */
	.section .note.pvh, "a", @note
	.balign 4
	.long 4, 8, 18
	.asciz "Xen"
	.quad pvh_entry

	.text
	.code32
/* Xen's docs/misc/pvh: flat segments, paging off, interrupts off, ebx holds the physical address of hvm_start_info. */
	.globl pvh_entry
pvh_entry:
	cld
	lgdt gdt_pointer
	movl $pdpt + 0x27, pml4
	movl $pd_0 + 0x27, pdpt
	movl $pd_3 + 0x27, pdpt + 24
	movl $0xe7, pd_0
	xorl %edi, %edi /* CPU 0 */
	ljmp $SEL_CODE32, $enter_long_mode

/* An AP jumps here from the trampoline. */
ap_entry:
	movl $SEL_DATA, %eax
	movl %eax, %ds
	movl ap_index, %edi

enter_long_mode: /* edi: CPU, ebx: hvm_start_info */
	movl $SEL_DATA, %eax
	movl %eax, %ds
	movl %eax, %es
	movl %eax, %ss
	movl $0x620, %eax /* PAE, OSFXSR, OSXMMEXCPT: ring 3 uses SSE2 */
	movl %eax, %cr4
	movl $pml4, %eax
	movl %eax, %cr3
	movl $0xc0000080, %ecx /* EFER */
	xorl %edx, %edx
	movl $0x100, %eax /* LME */
	wrmsr
	movl $0x80010033, %eax /* PG, WP, NE, ET, MP, PE; caches on */
	movl %eax, %cr0
	ljmp $SEL_CODE64, $long_mode

	.code64
long_mode:
	movl %edi, %esi
	shll $12, %esi
	addl $cpu_pages, %esi
	leaq CPU_PAGE(%rsi), %rsp
	movq %rsp, TSS_RSP0(%rsi)
	movw $TSS_SIZE, TSS_IOMAP_BASE(%rsi)
	movb $0xff, TSS_SIZE+IOMAP_SIZE(%rsi) /* the bitmap must end in a byte of ones (SDM 1, 19.5.2) */

	/* This CPU's TSS descriptor: available 64-bit TSS, base below 16 MiB (guest.ld asserts less). */
	movl %edi, %ecx
	shll $4, %ecx
	movq %rsi, %rax
	shlq $16, %rax
	movabsq $0x0000890000000000 + TSS_SIZE + IOMAP_SIZE, %rdx
	orq %rdx, %rax
	movq %rax, gdt_tss(%rcx)
	addl $SEL_TSS, %ecx
	ltr %cx

	testl %edi, %edi
	jnz 2f

	/* The first CPU masks both 8259s, which a BIOS may have enabled, and fills the IDT with gates to the 16-byte stubs. */
	movb $0xff, %al
	outb %al, $0x21
	outb %al, $0xa1
	movl $idt, %edx
	movl $vector_stubs, %eax
	movl $VECTORS, %ecx
1:	movw %ax, (%rdx)
	movl $0x8e000000 + SEL_CODE64, 2(%rdx) /* selector; IST 0, present, DPL 0, 64-bit interrupt gate */
	movl %eax, %r8d
	shrl $16, %r8d
	movw %r8w, 6(%rdx)
	addl $16, %eax
	addl $16, %edx
	decl %ecx
	jnz 1b

2:	lidt idt_pointer
	movl %edi, %eax
	incl %eax
	shll $14, %eax
	addl $user_stacks, %eax
	subl $8, %eax /* the alignment that the ABI requires at a function's entry */
	pushq $SEL_USER_DATA
	pushq %rax
	/*
	 * Interrupts on, IOPL 3. Port access needs the bitmap on KVMs that force IOPL to 0. It needs IOPL 3 on an emulator
	 * (QEMU with SVM) that does not recognise the TSS after KVM has restored it, which marks it busy.
	 */
	pushq $0x3202
	pushq $SEL_USER_CODE
	pushq $cpu_main
	movl %ebx, %esi
	xorl %ebp, %ebp
	xorl %r13d, %r13d
	xorl %r14d, %r14d /* cursor and pass (version.h) */
	xorl %r15d, %r15d
	iretq

/* Copied to TRAMPOLINE. An AP starts at its first byte with CS = TRAMPOLINE/16, IP = 0. */
	.section .rodata
	.balign 16
	.globl trampoline, trampoline_end
	.code16
trampoline:
	cli
	cld
	movw %cs, %ax
	movw %ax, %ds
	lgdtl trampoline_gdt - trampoline
	movl $0x11, %eax /* PE, ET */
	movl %eax, %cr0
	ljmpl $SEL_CODE32, $ap_entry
	.balign 4
trampoline_gdt:
	.word gdt_end - gdt - 1
	.long gdt
trampoline_end:
	.code64

	.data
	.balign 16
gdt:	.quad 0
	.quad 0x00cf9b000000ffff /* SEL_CODE32 */
	.quad 0x00cf93000000ffff /* SEL_DATA */
	.quad 0x00af9b000000ffff /* SEL_CODE64 */
	.quad 0x00cff3000000ffff /* SEL_USER_DATA */
	.quad 0x00affb000000ffff /* SEL_USER_CODE */
gdt_tss:
	.fill MAX_CPUS*2, 8, 0
gdt_end:

gdt_pointer:
	.word gdt_end - gdt - 1
	.long gdt
	.balign 8
idt_pointer:
	.word VECTORS*16 - 1
	.quad idt

/*
 * Identity-mapped 2 MiB pages: user, writable. Accessed and dirty bits are set in advance, so that page walks of an idle
 * guest write nothing. This is the first page, which has the image; memory.c maps the rest.
 */
	.bss
	.balign 4096
	.globl pdpt, pd_0, pd_3
pml4:	.skip 4096
pdpt:	.skip 4096
pd_0:	.skip 4096
pd_3:	.skip 4096

	.balign 4096
	.globl cpu_pages, user_stacks, idt
cpu_pages:
	.skip MAX_CPUS*CPU_PAGE
user_stacks:
	.skip MAX_CPUS*USER_STACK
idt:	.skip VECTORS*16
	.globl ap_index
ap_index:
	.skip 4

	.section .note.GNU-stack, "", @progbits
