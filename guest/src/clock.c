/* Time is the TSC's. Its rate, and the LAPIC timer's, are measured once against channel 2 of the 8254. */
#include "guest.h"

#define PIT_HZ 1193182UL
#define PIT_10MS 11932
#define PORT_GATE 0x61 /* bit 0: gate of channel 2, bit 1: speaker, bit 5: channel 2's output */

u64 tsc_hz = 2000000000, timer_hz = 1000000000;
bool clock_guessed;

u64 clock_ms(u64 ms)
{
	return mul_div(ms, tsc_hz, 1000);
}

struct interval {
	u64 tsc;
	u32 timer;
};

/* One run of 10 ms by the PIT; false where there is none, after a time that is not known. */
static bool pit_10ms(struct interval *passed)
{
	outb(PORT_GATE, (inb(PORT_GATE) & ~2) | 1);
	outb(0x43, 0xb0); /* channel 2, both bytes, mode 0: the output rises when the count ends */
	outb(0x42, PIT_10MS & 0xff);
	u32 timer = timer_count();
	u64 start = tsc();
	outb(0x42, PIT_10MS >> 8);
	for (u32 polls = 0; polls < 1000000; polls++) {
		if (!(inb(PORT_GATE) & 0x20))
			continue;
		passed->tsc = tsc() - start;
		passed->timer = timer - timer_count();
		return polls > 0; /* at once: nothing counts behind that port */
	}
	return false;
}

void clock_delay_10ms(void)
{
	struct interval unused;
	pit_10ms(&unused);
}

/* The shortest of three runs: a host that was busy elsewhere can only make one longer. */
void clock_calibrate(void)
{
	struct interval best = {~0UL, 0};
	timer_calibrating();
	for (int run = 0; run < 3; run++) {
		struct interval one;
		if (pit_10ms(&one) && one.tsc < best.tsc)
			best = one;
	}
	if (best.tsc == ~0UL || !best.tsc || !best.timer) {
		clock_guessed = true;
		return;
	}
	tsc_hz = mul_div(best.tsc, PIT_HZ, PIT_10MS);
	timer_hz = mul_div(best.timer, PIT_HZ, PIT_10MS);
}
