/* The local APIC (MMIO, not x2APIC), the IOAPIC's pin of the serial port, and the start of the other CPUs. */
#include "guest.h"

/* Registers: SDM 3, table 11-1. */
#define LAPIC 0xfee00000UL
#define LAPIC_ID 0x20
#define LAPIC_TPR 0x80
#define LAPIC_SPURIOUS 0xf0
#define LAPIC_ICR_LOW 0x300
#define LAPIC_ICR_HIGH 0x310
#define LAPIC_LVT_TIMER 0x320
#define LAPIC_LVT_LINT0 0x350
#define LAPIC_LVT_LINT1 0x360
#define LAPIC_TIMER_INITIAL 0x380
#define LAPIC_TIMER_CURRENT 0x390
#define LAPIC_TIMER_DIVIDE 0x3e0

#define LVT_MASKED (1 << 16)
#define LVT_PERIODIC (1 << 17)
#define ICR_PENDING (1 << 12)
#define ICR_INIT 0x4500    /* assert, INIT */
#define ICR_STARTUP 0x4600 /* assert, start-up; the vector is the page's number */

volatile u32 cpus_running = 1;

/* Inline assembly, so that KVM has to emulate only simple moves. */
static void lapic_write(u32 reg, u32 value)
{
	__asm__ volatile("movl %0, (%1)" : : "r"(value), "r"(LAPIC + reg) : "memory");
}

static u32 lapic_read(u32 reg)
{
	u32 value;
	__asm__ volatile("movl (%1), %0" : "=r"(value) : "r"(LAPIC + reg) : "memory");
	return value;
}

/* Enables this CPU's local APIC; its timer is masked. */
void lapic_init(void)
{
	lapic_write(LAPIC_SPURIOUS, 0x100 | VEC_SPURIOUS);
	lapic_write(LAPIC_LVT_LINT0, LVT_MASKED); /* a BIOS may have connected the 8259 */
	lapic_write(LAPIC_LVT_LINT1, LVT_MASKED);
	lapic_write(LAPIC_TIMER_DIVIDE, 0xb); /* by 1 */
	lapic_write(LAPIC_LVT_TIMER, LVT_MASKED | VEC_TIMER);
	lapic_write(LAPIC_TPR, 0);
}

/*
 * Sets a periodic interrupt, in TSC cycles. A sleep needs only one, but if it were lost, the next one would end the
 * sleep. The count has 32 bits; at KVM's 1 GHz that is 4.2 s.
 */
void timer_set(u64 cycles)
{
	u64 count = mul_div(cycles, timer_hz, tsc_hz);
	if (count < 1000)
		count = 1000;
	if (count > 0xffffffff)
		count = 0xffffffff;
	lapic_write(LAPIC_LVT_TIMER, LVT_PERIODIC | VEC_TIMER);
	lapic_write(LAPIC_TIMER_INITIAL, count);
}

/* Lets the masked timer count down from its maximum; timer_count reads it. */
void timer_calibrating(void)
{
	lapic_write(LAPIC_LVT_TIMER, LVT_MASKED | VEC_TIMER);
	lapic_write(LAPIC_TIMER_INITIAL, 0xffffffff);
}

u32 timer_count(void)
{
	return lapic_read(LAPIC_TIMER_CURRENT);
}

/* Masks all pins, except the serial port's, which goes to this CPU: edge-triggered, active high, like ISA. */
void ioapic_init(void)
{
	volatile u32 *select = (volatile u32 *)machine.ioapic, *window = select + 4;
	*select = 1; /* version */
	u32 pins = (*window >> 16 & 0xff) + 1;
	for (u32 pin = 0; pin < pins; pin++) {
		*select = 0x10 + 2 * pin;
		*window = 1 << 16;
	}
	if (machine.serial_pin >= pins)
		return;
	*select = 0x11 + 2 * machine.serial_pin;
	*window = lapic_read(LAPIC_ID) & 0xff000000;
	*select = 0x10 + 2 * machine.serial_pin;
	*window = VEC_SERIAL;
}

static void send(u8 lapic_id, u32 command)
{
	while (lapic_read(LAPIC_ICR_LOW) & ICR_PENDING)
		;
	lapic_write(LAPIC_ICR_HIGH, (u32)lapic_id << 24);
	lapic_write(LAPIC_ICR_LOW, command);
}

void cpu_wake(u32 cpu)
{
	send(machine.lapic_id[cpu], 0x4000 | VEC_WAKE);
}

/* INIT to all CPUs, a wait of 10 ms, then one CPU after another (MP specification, B.4). */
void cpus_start(void)
{
	if (machine.cpus == 1)
		return;
	volatile u8 *to = (volatile u8 *)TRAMPOLINE;
	for (u32 i = 0; trampoline + i < trampoline_end; i++)
		to[i] = trampoline[i];
	for (u32 cpu = 1; cpu < machine.cpus; cpu++)
		send(machine.lapic_id[cpu], ICR_INIT);
	clock_delay_10ms();
	for (u32 cpu = 1; cpu < machine.cpus; cpu++) {
		*(volatile u32 *)&ap_index = cpu;
		for (int attempt = 0; attempt < 2 && cpus_running <= cpu; attempt++) {
			send(machine.lapic_id[cpu], ICR_STARTUP | TRAMPOLINE >> 12);
			for (int wait = 0; wait < 20 && cpus_running <= cpu; wait++)
				clock_delay_10ms();
		}
		if (cpus_running <= cpu) {
			machine.cpus = cpu; /* use the CPUs that have started */
			return;
		}
	}
}
