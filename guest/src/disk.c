/*
 * The disk, virtio 1.2 section 5.2. In each round, every page is written with a new version, the disk is flushed, and every
 * page is read back and checked. Several requests are in flight, also during a migration.
 */
#include "devices.h"
#include "serial.h"
#include "work.h"

#define FEATURE_READ_ONLY (1UL << 5)
#define FEATURE_FLUSH (1UL << 9)

enum { READ = 0, WRITE = 1, FLUSH = 4 }; /* section 5.2.6 */
#define STATUS_NONE 0xff /* not a status of the specification */

#define SECTORS (PAGE / 512) /* in a page */
#define SLOTS 4
#define SLOT_PAGES 16
#define FIRST_NUMBER 0x80000000UL /* so that no page of the disk equals one of the memory */
#define BAD_LINES 10

struct virtio disk_device;
u64 disk_writes, disk_reads, disk_bad;

static struct queue requests;
static struct slot {
	struct {
		u32 type, reserved;
		u64 sector;
	} header;
	volatile u8 status;
	bool busy;
	u32 pages;
	u64 first;
} slots[SLOTS];
static u8 buffer[SLOTS][SLOT_PAGES * PAGE] __attribute__((aligned(4096)));

static u64 capacity; /* pages */
static u64 wanted, used; /* number of pages: as set, and in this round */
static u64 version;  /* of this round; never repeats */
static u64 next_page;
static u32 in_flight;
static enum { WRITING, FLUSHING, READING } phase;
static u64 interval, due; /* TSC cycles for each page; TSC of the next request */
static u32 lines;

void disk_init(void)
{
	struct virtio *d = &disk_device;
	if (!virtio_open(d, VIRTIO_BLK, FEATURE_READ_ONLY | FEATURE_FLUSH, 0) || !virtio_queue(d, &requests, 0))
		return;
	capacity = (virtio_config32(d, 0) | (u64)virtio_config32(d, 4) << 32) / SECTORS;
	virtio_start(d);
	disk_pace(4000);
	struct line l = {0};
	put(&l, "disk: ");
	put_size(&l, capacity * PAGE);
	if (d->features & FEATURE_READ_ONLY)
		put(&l, ", read-only");
	if (!d->messages)
		put(&l, ", without MSI-X");
	serial_line(&l);
}

u64 disk_pages(void)
{
	return disk_device.there && !(disk_device.features & FEATURE_READ_ONLY) ? capacity : 0;
}

void disk_use(u64 pages)
{
	wanted = pages;
}

void disk_pace(u64 per_second)
{
	interval = per_second ? tsc_hz / per_second + 1 : 0;
	due = tsc();
}

static void send(struct slot *s, u32 type, u64 first, u32 pages)
{
	u32 i = s - slots;
	s->header.type = type;
	s->header.sector = first * SECTORS;
	s->status = STATUS_NONE;
	s->first = first;
	s->pages = pages;
	s->busy = true;
	in_flight++;
	struct piece pieces[3] = {{&s->header, 16}};
	u32 n = 1;
	if (pages)
		pieces[n++] = (struct piece){buffer[i], pages * PAGE};
	pieces[n++] = (struct piece){&s->status, 1};
	queue_add(&requests, pieces, type == READ ? 1 : n - 1, type == READ ? 2 : 1, i);
	queue_kick(&requests);
}

static void say_failed(struct slot *s)
{
	struct line l = {0};
	disk_bad += s->pages ? s->pages : 1;
	if (lines++ >= BAD_LINES)
		return;
	put(&l, "disk: request of type ");
	put_number(&l, s->header.type);
	put(&l, " for ");
	put_number(&l, s->pages);
	put(&l, " pages from ");
	put_number(&l, s->first);
	put(&l, " failed with status ");
	put_number(&l, s->status);
	serial_line(&l);
}

static void say_bad(const u8 *page, u64 index)
{
	struct finding f;
	struct line l = {0};
	disk_bad++;
	if (lines++ >= BAD_LINES)
		return;
	page_examine(page, FIRST_NUMBER + index, version, 0, &f);
	put(&l, "bad disk page ");
	put_number(&l, index);
	put_finding(&l, &f);
	serial_line(&l);
}

static void done(struct slot *s)
{
	u8 *pages = buffer[s - slots];
	s->busy = false;
	in_flight--;
	if (s->status != 0) {
		say_failed(s);
	} else if (s->header.type == WRITE) {
		disk_writes += s->pages;
	} else if (s->header.type == READ) {
		for (u32 i = 0; i < s->pages; i++)
			if (!page_good(pages + i * PAGE, FIRST_NUMBER + s->first + i, version, 0))
				say_bad(pages + i * PAGE, s->first + i);
		disk_reads += s->pages;
	}
}

/* Sends the next request of this phase. A buffer is overwritten before it is read into: its old content may be right. */
static void issue(struct slot *s)
{
	u64 left = used - next_page;
	u32 pages = left < SLOT_PAGES ? left : SLOT_PAGES;
	u8 *to = buffer[s - slots];
	for (u32 i = 0; i < pages; i++) {
		if (phase == WRITING)
			page_write(to + i * PAGE, FIRST_NUMBER + next_page + i, version, 0);
		else
			*(volatile u64 *)(to + i * PAGE) = 0;
	}
	send(s, phase == WRITING ? WRITE : READ, next_page, pages);
	next_page += pages;
	due += interval * pages;
}

/* Called when all requests of the phase are complete. */
static void next_phase(void)
{
	next_page = 0;
	switch (phase) {
	case WRITING:
		phase = FLUSHING;
		if (disk_device.features & FEATURE_FLUSH) {
			send(&slots[0], FLUSH, 0, 0);
			return;
		}
	case FLUSHING:
		phase = READING;
		return;
	case READING:
		phase = WRITING;
		used = wanted;
		version++;
		lines = 0;
	}
}

void disk_step(u64 now, u64 *next)
{
	struct virtio *d = &disk_device;
	u32 token, length;
	if (!d->there || !(used || wanted))
		return;
	while (queue_take(&requests, &token, &length))
		if (token < SLOTS && slots[token].busy)
			done(&slots[token]);
	if (!in_flight && (phase == FLUSHING || next_page >= used || (used != wanted && phase != READING))) {
		if (used != wanted)
			phase = READING; /* ends this round: its pages are not read */
		next_phase();
	}
	if (!used || phase == FLUSHING || next_page >= used) {
		if (in_flight && !d->messages)
			sooner(next, now + clock_ms(1));
		return;
	}
	is_due(now, &due, interval * SLOT_PAGES + tsc_hz);
	if ((s64)(now - due) > (s64)clock_ms(100))
		due = now;
	for (u32 i = 0; i < SLOTS && next_page < used && (s64)(now - due) >= 0; i++)
		if (!slots[i].busy)
			issue(&slots[i]);
	if ((s64)(due - now) > 0)
		sooner(next, due);
	else if (!d->messages)
		sooner(next, now + clock_ms(1));
}
