/* Included by every C file of the demo guest. All C runs in ring 3, at native speed even if ring 0 is emulated. */
#ifndef GUEST_H
#define GUEST_H

#include "layout.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long s64;
typedef _Bool bool;
#define true 1
#define false 0

#define KIB 1024UL
#define MIB (1024UL * 1024)
#define GIB (1024UL * 1024 * 1024)
#define PAGE 4096UL
#define PAGE_SHIFT 12

static inline void outb(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline void outw(u16 port, u16 value)
{
	__asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u8 inb(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline void outl(u16 port, u32 value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline u32 inl(u16 port)
{
	u32 value;
	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}

static inline u64 tsc(void)
{
	u32 low, high;
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
	return (u64)high << 32 | low;
}

/* a * b / c with a 128-bit product. The quotient must fit in 64 bits. */
static inline u64 mul_div(u64 a, u64 b, u64 c)
{
	u64 low, high, quotient, rest;
	__asm__("mulq %3" : "=a"(low), "=d"(high) : "a"(a), "r"(b));
	__asm__("divq %4" : "=a"(quotient), "=d"(rest) : "a"(low), "d"(high), "r"(c));
	return quotient;
}

/* boot.S, trap.S */
void service(u32 number, u32 value);
extern u32 ap_index;
extern volatile u8 serial_interrupted;
extern u64 pdpt[512], pd_0[512], pd_3[512];
extern const u8 trampoline[], trampoline_end[];
extern u8 image_end[];

/* memory.c: the content of the PVH start info. */
#define MAX_EXTENTS 32
struct extent {
	u64 gpa;
	u64 pages;
};
extern struct extent ram[MAX_EXTENTS]; /* RAM that can be owned, ascending */
extern u32 ram_extents;
extern u64 ram_pages;   /* sum over ram[] */
extern u64 memory_size; /* bytes of RAM in total */
extern char command_line[1024];
void memory_init(u64 start_info);
bool map_device(u64 gpa); /* maps the 2 MiB around gpa and the next 2 MiB; false: not possible */

/* mptable.c */
struct machine {
	u32 cpus;
	u32 cpus_listed; /* may be more than MAX_CPUS */
	u8 lapic_id[MAX_CPUS];
	u64 ioapic;      /* MMIO address */
	u32 serial_pin;  /* of the IOAPIC, for ISA IRQ 4 */
	bool table_found;
};
extern struct machine machine;
void machine_init(void);

/* apic.c */
void lapic_init(void);
void ioapic_init(void);
void cpus_start(void);
void cpu_wake(u32 cpu);
void timer_set(u64 tsc_cycles);
u32 timer_count(void);
void timer_calibrating(void);
extern volatile u32 cpus_running;

/* clock.c */
extern u64 tsc_hz, timer_hz;
extern bool clock_guessed;
u64 clock_ms(u64 ms); /* TSC cycles */
void clock_delay_10ms(void);
void clock_calibrate(void);

/* main.c */
void cpu_main(u64 cpu, u64 start_info);

#endif
