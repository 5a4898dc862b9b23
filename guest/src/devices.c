/* All drivers together. */
#include "devices.h"
#include "pool.h"
#include "serial.h"

void devices_init(void)
{
	disk_init();
	net_init();
	balloon_init();
}

void devices_step(u64 now, u64 *next)
{
	disk_step(now, next);
	net_step(now, next);
	pool_step(now, next);
	balloon_step(now, next);
}

static void count(struct line *l, const char *name, u64 n)
{
	put(l, name);
	put_number(l, n);
}

void devices_count(struct line *l)
{
	if (disk_device.there) {
		count(l, " dwrites=", disk_writes);
		count(l, " dreads=", disk_reads);
		count(l, " dbad=", disk_bad);
	}
	if (net_device.there) {
		count(l, " rx=", net_received);
		count(l, " tx=", net_sent);
		count(l, " announced=", net_announced);
	}
	if (pool_blocks) {
		count(l, " pool=", pool_count(BLOCK_FULL));
		count(l, " checked=", pool_checked);
	}
	if (balloon_device.there) {
		count(l, " ballooned=", balloon_pages);
		count(l, " hinted=", hinted_pages);
		count(l, " rounds=", hint_rounds);
		count(l, " retaken=", pool_retaken);
		count(l, " reported=", reported_pages);
		count(l, " zeroed=", pool_zeroed);
		count(l, " stale=", pool_stale);
	}
	if (disk_device.there || net_device.there || balloon_device.there) {
		u64 interrupts = 0;
		for (u32 i = 0; i < DEVICE_VECTORS; i++)
			interrupts += device_interrupts[i];
		count(l, " irqs=", interrupts);
	}
}
