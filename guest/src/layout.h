/* Numbers for assembly and C, so without C syntax. */
#ifndef LAYOUT_H
#define LAYOUT_H

#define MAX_CPUS 8

/* Segment selectors. SYSCALL, which requires an order, is not used. */
#define SEL_CODE32 0x08
#define SEL_DATA 0x10
#define SEL_CODE64 0x18
#define SEL_USER_DATA 0x23
#define SEL_USER_CODE 0x2b
#define SEL_TSS 0x30 /* one descriptor of 16 bytes for each CPU */

/*
 * One page for each CPU: the TSS with its I/O permission bitmap, a flag, and ring 0's stack, which grows down from the
 * page's end. So ring 0 finds the page by masking its stack pointer.
 */
#define CPU_PAGE 4096
#define TSS_RSP0 4
#define TSS_IOMAP_BASE 102
#define TSS_SIZE 104
#define IOMAP_SIZE 512 /* ports 0 to 0xfff; zero bits: allowed in ring 3 */
#define CPU_WOKEN 640  /* byte: an interrupt has come since the last sleep ended */

/* Interrupt vectors. 0 to 31 are exceptions. Old APICs require ones in the spurious vector's low four bits. */
#define VEC_SERIAL 36
#define VEC_TIMER 48
#define VEC_WAKE 49
#define VEC_DEVICES 50 /* two for each device: configuration, queues */
#define DEVICE_VECTORS 6
#define VEC_SPURIOUS 63
#define VECTORS 64

#define LAPIC_EOI 0xfee000b0

/* Ring 3's requests to ring 0, in eax at the UD2 named service_ud2. */
#define SERVICE_SLEEP 0
#define SERVICE_TRIPLE_FAULT 1
#define SERVICE_KVMCLOCK 2 /* with MSR_KVM_SYSTEM_TIME_NEW's new value in esi */

/* The address where application processors start in real mode: any free page below 1 MiB. */
#define TRAMPOLINE 0x8000

#define USER_STACK 16384

#endif
