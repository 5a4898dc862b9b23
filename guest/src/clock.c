/*
 * Time is the TSC's. KVM says its frequency, through its paravirtual clock; the LAPIC timer's is then measured by it. On
 * other hypervisors both are measured with channel 0 of the 8254, whose count can be read. Channel 2, which others use,
 * needs port 0x61, which not every virtual machine has, and not every one has an 8254.
 */
#include "guest.h"

#define PIT_HZ 1193182UL
#define PIT_START 0xffff
#define PIT_10MS 11932
#define PIT_CHANNEL0 0x40
#define PIT_COMMAND 0x43

u64 tsc_hz = 2000000000, timer_hz = 1000000000;
bool clock_guessed;

u64 clock_ms(u64 ms)
{
	return mul_div(ms, tsc_hz, 1000);
}

/* A reading of three clocks at one time. */
struct moment {
	u64 tsc;
	u32 timer, pit; /* both count down */
};

/* Latches the count (command 0), so that its two bytes belong together. */
static struct moment read_clocks(void)
{
	struct moment m;
	outb(PIT_COMMAND, 0);
	m.tsc = tsc();
	m.timer = timer_count();
	m.pit = inb(PIT_CHANNEL0);
	m.pit |= inb(PIT_CHANNEL0) << 8;
	return m;
}

/*
 * Waits about 10 ms by the 8254; false if it does not count, after an unknown time. The channel's interrupt is masked in
 * the 8259 and in the IOAPIC.
 */
static bool pit_10ms(struct moment *passed)
{
	outb(PIT_COMMAND, 0x30); /* channel 0, both bytes, mode 0: counts down once */
	outb(PIT_CHANNEL0, PIT_START & 0xff);
	outb(PIT_CHANNEL0, PIT_START >> 8);
	struct moment start = read_clocks(), now = start;
	for (u32 polls = 0; polls < 100000; polls++) {
		now = read_clocks();
		if (now.pit > start.pit || start.pit - now.pit >= PIT_10MS)
			break;
		if (polls == 1000 && now.pit == start.pit)
			break; /* there is none */
	}
	*passed = (struct moment){now.tsc - start.tsc, start.timer - now.timer, start.pit - now.pit};
	return now.pit < start.pit && passed->pit >= PIT_10MS;
}

/* Linux's Documentation/virt/kvm/x86/msr.rst, struct pvclock_vcpu_time_info. */
static volatile struct {
	u32 version, unused;
	u64 tsc, nanoseconds;
	u32 multiplier;
	signed char shift;
	u8 flags, more[2];
} __attribute__((aligned(32))) kvmclock;

/* Asks KVM for the TSC's frequency; false if there is no KVM or its clock is off. */
static bool ask_kvm(void)
{
	u32 a = 0x40000000, b, c, d;
	__asm__ volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
	if (b != 0x4b4d564b || c != 0x564b4d56 || d != 0x4d) /* KVMKVMKVM */
		return false;
	a = 0x40000001;
	__asm__ volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
	if (!(a & 1 << 3)) /* KVM_FEATURE_CLOCKSOURCE2 */
		return false;
	service(SERVICE_KVMCLOCK, (u32)(u64)&kvmclock | 1);
	/* KVM fills it when it enters the guest the next time. */
	for (u32 polls = 0; polls < 1000 && (!kvmclock.multiplier || kvmclock.version & 1); polls++)
		outb(0x80, 0);
	service(SERVICE_KVMCLOCK, 0); /* it would go on writing to memory */
	if (!kvmclock.multiplier)
		return false;
	/* Nanoseconds are cycles << shift, times multiplier, >> 32. */
	tsc_hz = mul_div(1000000000, 1UL << 32, kvmclock.multiplier);
	tsc_hz = kvmclock.shift < 0 ? tsc_hz << -kvmclock.shift : tsc_hz >> kvmclock.shift;
	return true;
}

static bool tsc_known(void)
{
	static bool asked, known;
	if (!asked)
		known = ask_kvm();
	asked = true;
	return known;
}

/* Reads the TSC and the LAPIC timer; again if something came between. */
static struct moment read_timer(void)
{
	struct moment m;
	for (int attempt = 0; attempt < 10; attempt++) {
		m.tsc = tsc();
		m.timer = timer_count();
		if (tsc() - m.tsc < tsc_hz / 20000)
			break;
	}
	return m;
}

void clock_delay_10ms(void)
{
	if (tsc_known()) {
		u64 start = tsc();
		while (tsc() - start < tsc_hz / 100)
			;
		return;
	}
	struct moment unused;
	pit_10ms(&unused);
}

/*
 * With the 8254, uses the shortest of three runs: a run is longer if the host was busy with something else between two readings.
 */
void clock_calibrate(void)
{
	struct moment best = {0, 0, ~0U};
	timer_calibrating();
	if (tsc_known()) {
		struct moment start = read_timer();
		clock_delay_10ms();
		struct moment end = read_timer();
		timer_hz = mul_div(start.timer - end.timer, tsc_hz, end.tsc - start.tsc);
		if (!timer_hz)
			timer_hz = 1000000000; /* KVM's */
		return;
	}
	for (int run = 0; run < 3; run++) {
		struct moment one;
		if (pit_10ms(&one) && one.pit < best.pit)
			best = one;
	}
	if (!best.tsc || !best.timer) {
		clock_guessed = true;
		return;
	}
	tsc_hz = mul_div(best.tsc, PIT_HZ, best.pit);
	timer_hz = mul_div(best.timer, PIT_HZ, best.pit);
}
