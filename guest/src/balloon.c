/* The balloon, virtio 1.2 section 5.5: size, statistics and free page reporting. hint.c sends hints. */
#include "devices.h"
#include "pool.h"
#include "serial.h"
#include "work.h"

#define FEATURE_STATISTICS (1UL << 1)
#define FEATURE_HINTS (1UL << 3)
#define FEATURE_REPORTING (1UL << 5)

/* Section 5.5.4. */
#define CONFIG_WANTED 0
#define CONFIG_ACTUAL 4
#define CONFIG_COMMAND 8

#define REPORT_BLOCKS 16 /* in one request: 64 MiB */

struct virtio balloon_device;
u64 balloon_pages, reported_pages;
bool reports_wanted = true;

static struct queue inflate, deflate, statistics, reporting;
static u32 wanted;           /* pages: the host's target */
static u32 numbers[BLOCK_PAGES]; /* page numbers of the request in flight */
static u32 in_flight;        /* its number of pages; 0: no request */
static bool inflating;       /* it is in the inflate queue */
static u32 stack[MAX_BLOCKS], depth; /* blocks in the balloon; only the last may be partly in it */
static u32 part;             /* pages of the last block in the balloon */
static u32 reports_in_flight;
static bool told_short;

static struct {
	u16 tag;
	u64 value;
} __attribute__((packed)) counts[3];

/* Section 5.5.6.3: bytes. */
static void fill_statistics(void)
{
	enum { FREE = 4, TOTAL = 5, AVAILABLE = 6 };
	u64 spare = ram_pages - settings.owned - pool_pages;
	u64 free = pool_count(BLOCK_FREE) + pool_count(BLOCK_HINTED) + pool_count(BLOCK_REPORTING) + spare;
	counts[0].tag = FREE;
	counts[0].value = free * PAGE;
	counts[1].tag = TOTAL;
	counts[1].value = memory_size - balloon_pages * PAGE;
	counts[2].tag = AVAILABLE;
	counts[2].value = free * PAGE;
	struct piece p = {counts, sizeof counts};
	queue_add(&statistics, &p, 1, 0, 0);
	queue_kick(&statistics);
}

void balloon_init(void)
{
	struct virtio *d = &balloon_device;
	if (!virtio_open(d, VIRTIO_BALLOON, FEATURE_STATISTICS | FEATURE_HINTS | FEATURE_REPORTING, 4) ||
	    !virtio_queue(d, &inflate, 0) || !virtio_queue(d, &deflate, 1))
		return;
	if ((d->features & FEATURE_STATISTICS) && !virtio_queue(d, &statistics, 2))
		return;
	if (d->features & FEATURE_HINTS)
		hint_init(d);
	/* Queue 4 (section 5.5.2). QEMU numbers the existing queues without gaps. */
	if ((d->features & FEATURE_REPORTING) && d->there)
		virtio_queue(d, &reporting, virtio_queues(d) > 4 ? 4 : 3);
	if (!d->there)
		return;
	virtio_start(d);
	if (d->features & FEATURE_STATISTICS)
		fill_statistics();
	struct line l = {0};
	put(&l, "balloon: inflation");
	if (d->features & FEATURE_STATISTICS)
		put(&l, ", statistics");
	if (d->features & FEATURE_HINTS)
		put(&l, ", free page hints");
	if (d->features & FEATURE_REPORTING)
		put(&l, ", free page reporting");
	if (!d->messages)
		put(&l, ", without MSI-X");
	serial_line(&l);
}

static void say_short(void)
{
	if (told_short)
		return;
	told_short = true;
	struct line l = {0};
	put(&l, "balloon: target ");
	put_size(&l, wanted * PAGE);
	put(&l, ", size ");
	put_size(&l, balloon_pages * PAGE);
	put(&l, ": no memory left in the pool (pool=SIZE makes one)");
	serial_line(&l);
}

/* The highest free block, otherwise the highest full one. */
static struct block *spare_block(void)
{
	for (u32 state = BLOCK_FREE; state <= BLOCK_FULL; state += BLOCK_FULL - BLOCK_FREE)
		for (u32 i = pool_blocks; pool_count(state) && i-- > 0;)
			if (block_state(&pool[i]) == state)
				return &pool[i];
	return 0;
}

static void send(struct queue *q, struct block *b, u32 from, u32 n)
{
	for (u32 i = 0; i < n; i++)
		numbers[i] = b->first + from + i;
	in_flight = n;
	inflating = q == &inflate;
	struct piece p = {numbers, n * 4};
	queue_add(q, &p, 1, 0, 0);
	queue_kick(q);
}

static void grow(void)
{
	struct block *b = depth ? &pool[stack[depth - 1]] : 0;
	if (!b || part == b->pages) {
		b = spare_block();
		if (!b) {
			if (!pool_count(BLOCK_TAKING) && !pool_count(BLOCK_REPORTING) && !pool_count(BLOCK_HINTED))
				say_short();
			return;
		}
		if (block_state(b) == BLOCK_FULL)
			block_free(b);
		block_become(b, BLOCK_BALLOON);
		stack[depth++] = b - pool;
		part = 0;
	}
	u32 room = b->pages - part, missing = wanted - balloon_pages;
	send(&inflate, b, part, missing < room ? missing : room);
}

static void shrink(void)
{
	struct block *b = &pool[stack[depth - 1]];
	u32 excess = balloon_pages - wanted, n = excess < part ? excess : part;
	send(&deflate, b, part - n, n);
}

/* The device has used the request. A block that has left the balloon is taken, which checks that its pages are usable. */
static void answered(void)
{
	u32 n = in_flight;
	in_flight = 0;
	if (inflating) {
		part += n;
		balloon_pages += n;
		struct block *b = &pool[stack[depth - 1]];
		if (part > b->given)
			b->given = part;
	} else {
		part -= n;
		balloon_pages -= n;
		if (!part) {
			block_take(&pool[stack[--depth]]);
			part = depth ? pool[stack[depth - 1]].pages : 0;
		}
	}
	mmio_write32(balloon_device.config + CONFIG_ACTUAL, balloon_pages);
}

/* Section 5.5.6.6: reports free blocks that were not reported since they were freed. */
static void report(void)
{
	struct piece pieces[REPORT_BLOCKS];
	u32 n = 0;
	static u32 at;
	if (reports_in_flight || !reports_wanted || !pool_count(BLOCK_FREE))
		return;
	for (u32 tries = 0; tries < 128 && n < REPORT_BLOCKS && n < reporting.size; tries++) {
		at = at + 1 < pool_blocks ? at + 1 : 0;
		struct block *b = &pool[at];
		if (block_state(b) != BLOCK_FREE || (b->note & NOTE_REPORTED) || !block_version(b))
			continue;
		bool twice = n && pieces[0].at == block_page(b, 0);
		if (twice)
			break;
		pieces[n++] = (struct piece){block_page(b, 0), b->pages * PAGE};
		block_become(b, BLOCK_REPORTING);
	}
	if (!n)
		return;
	queue_add(&reporting, pieces, 0, n, 0);
	queue_kick(&reporting);
	reports_in_flight = 1;
}

static void reported(void)
{
	reports_in_flight = 0;
	for (u32 i = 0; i < pool_blocks; i++)
		if (block_state(&pool[i]) == BLOCK_REPORTING) {
			block_become(&pool[i], BLOCK_FREE);
			block_flag(&pool[i], NOTE_REPORTED, 0);
			reported_pages += pool[i].pages;
		}
}

void balloon_step(u64 now, u64 *next)
{
	struct virtio *d = &balloon_device;
	u32 token, length;
	if (!d->there)
		return;
	if (virtio_changed(d, now, next)) {
		u32 before = wanted;
		wanted = virtio_config32(d, CONFIG_WANTED);
		if (wanted != before)
			told_short = false;
		if (d->features & FEATURE_HINTS)
			hint_command(virtio_config32(d, CONFIG_COMMAND));
	}
	if (in_flight && queue_take(inflating ? &inflate : &deflate, &token, &length))
		answered();
	if (!in_flight && balloon_pages < wanted)
		grow();
	else if (!in_flight && balloon_pages > wanted)
		shrink();
	if ((d->features & FEATURE_STATISTICS) && queue_take(&statistics, &token, &length))
		fill_statistics();
	if (d->features & FEATURE_REPORTING) {
		if (reports_in_flight && queue_take(&reporting, &token, &length))
			reported();
		report();
	}
	if (d->features & FEATURE_HINTS)
		hint_step(next);
	if ((in_flight || reports_in_flight) && !d->messages)
		sooner(next, now + clock_ms(1));
}
