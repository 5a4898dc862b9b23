/*
 * Time is the TSC's. Its frequency and the LAPIC timer's are measured once with channel 0 of the 8254, whose count can be
 * read. Channel 2, which others use, needs port 0x61, which not every virtual machine has.
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
	}
	*passed = (struct moment){now.tsc - start.tsc, start.timer - now.timer, start.pit - now.pit};
	return now.pit < start.pit && passed->pit >= PIT_10MS;
}

void clock_delay_10ms(void)
{
	struct moment unused;
	pit_10ms(&unused);
}

/*
 * Uses the shortest of three runs: a run is longer if the host was busy with something else between two readings.
 */
void clock_calibrate(void)
{
	struct moment best = {0, 0, ~0U};
	timer_calibrating();
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
