/* The hostile guest's requests: what makes sense for each kind of device, what does not, and rings of both formats. */
#include "hostile.h"

enum { NET = 1, BLK = 2, CONSOLE = 3, RNG = 4, BALLOON = 5, VSOCK = 19 };
enum { NEXT = 1, WRITE = 2, INDIRECT = 4, AVAILABLE = 1 << 7, USED = 1 << 15 };
enum { DISK_IN = 0, DISK_OUT = 1, DISK_DISCARD = 11, DISK_WRITE_ZEROES = 13 };
enum { INFLATE, DEFLATE, STATS, HINT, REPORT };
#define PARTS 8

struct part {
	u64 address;
	u32 length;
	u16 flags;
};

/* A request that is being made. */
struct request {
	struct part part[PARTS];
	u32 n;
};

static void put32(u64 at, u32 value)
{
	if (at >= arena && at <= arena_end - 4)
		*(volatile u32 *)at = value;
}

static void put16(u64 at, u16 value)
{
	if (at >= arena && at <= arena_end - 2)
		*(volatile u16 *)at = value;
}

static u16 get16(u64 at)
{
	return at >= arena && at <= arena_end - 2 ? *(volatile u16 *)at : 0;
}

static u32 any_length(struct chance *c)
{
	switch (below(c, 16)) {
	case 0:
		return any_value(c);
	case 1:
		return 0;
	case 2:
		return below(c, 8 * MIB);
	case 3:
	case 4:
		return 512 * below(c, 256);
	}
	return below(c, 8 * KIB) >> below(c, 10);
}

/* Adds a part of the request in good memory. Returns its address. */
static u64 part(struct chance *c, struct request *r, u32 length, u16 flags)
{
	u64 at = (DATA + below(c, arena_end - DATA - length)) & -16UL;
	if (r->n < PARTS)
		r->part[r->n++] = (struct part){at, length, flags};
	return at;
}

static void disk(struct chance *c, struct request *r)
{
	static const u32 kinds[] = {DISK_IN, DISK_OUT, DISK_IN, DISK_OUT, 4, 8, DISK_DISCARD, DISK_WRITE_ZEROES, 99};
	u32 kind = kinds[below(c, 9)];
	u64 at = part(c, r, 16, 0);
	put32(at, kind);
	put32(at + 4, 0);
	put32(at + 8, below(c, 8 * KIB + 8)); /* sectors of a disk of 4 MiB, and some more */
	put32(at + 12, 0);
	if (kind == DISK_IN || kind == DISK_OUT) {
		for (u64 n = 1 + below(c, 4); n; n--)
			part(c, r, 512 * (below(c, 8) ? 1 + below(c, 16) : below(c, 4096)), kind == DISK_IN ? WRITE : 0);
	} else if (kind == DISK_DISCARD || kind == DISK_WRITE_ZEROES) {
		at = part(c, r, 16, 0);
		put32(at, below(c, 8 * KIB));
		put32(at + 4, 0);
		put32(at + 8, below(c, KIB));
		put32(at + 12, below(c, 2));
	} else {
		part(c, r, 20, WRITE);
	}
	part(c, r, 1, WRITE);
}

static void net(struct chance *c, struct target *t, u16 queue, struct request *r)
{
	u64 at;
	if (queue + 1 == t->queues && queue % 2 == 0) { /* control */
		static const u32 commands[] = {0x0000, 0x0100, 0x0101, 0x0003, 0x0004, 0x0005, 0x0102};
		at = part(c, r, below(c, 4) ? 4 : below(c, 12), 0);
		put32(at, commands[below(c, 7)] | below(c, 4) << 16);
		put32(at + 4, any_value(c));
		part(c, r, 1, WRITE);
		return;
	}
	if (queue % 2 == 0) {
		part(c, r, below(c, 2) ? 64 * KIB : 12 + below(c, 2000), WRITE);
		return;
	}
	at = part(c, r, 12 + 14 + below(c, below(c, 16) ? 1500 : 60 * KIB), 0);
	for (u32 i = 0; i < 12; i += 4)
		put32(at + i, 0);
	if (below(c, 2)) { /* checksum and segmentation offload */
		put32(at, 1 | below(c, 6) << 8 | below(c, 100) << 16);
		put32(at + 4, below(c, 2000) | below(c, 100) << 16);
		put32(at + 8, below(c, 20));
	}
	put32(at + 12, below(c, 2) ? 0xffffffff : any_value(c));
	put32(at + 16, 0x0252ffff);
	put32(at + 20, any_value(c));
	put32(at + 24, below(c, 2) ? 0x00450008 : any_value(c));
}

static void balloon(struct chance *c, u16 queue, struct request *r)
{
	if (queue == REPORT || (queue == HINT && below(c, 2))) {
		for (u64 n = 1 + below(c, 4); n; n--) {
			part(c, r, PAGE << below(c, 8), WRITE);
			r->part[r->n - 1].address &= -PAGE;
		}
		return;
	}
	u32 n = queue == HINT ? 4 : queue == STATS ? 10 * below(c, 20) : 4 * (below(c, 128) ? below(c, 200) : MIB);
	u64 at = part(c, r, n, 0);
	for (u32 i = 0; i < n && i < 64 * KIB; i += 4)
		put32(at + i, queue == HINT ? below(c, 8) : (DATA + below(c, arena_end - DATA)) >> PAGE_SHIFT);
}

static void vsock(struct chance *c, u16 queue, struct request *r)
{
	if (queue != 1) {
		part(c, r, below(c, 4) ? 4 * KIB : 44 + below(c, 100), WRITE);
		return;
	}
	u32 payload = below(c, 2) ? below(c, 8 * KIB) : 0;
	u64 at = part(c, r, 44, 0);
	for (u32 i = 0; i < 44; i += 4)
		put32(at + i, 0);
	put32(at, 3); /* from the guest, to the host */
	put32(at + 8, 2);
	put32(at + 16, below(c, 8));
	put32(at + 20, below(c, 8));
	put32(at + 24, payload);
	put32(at + 28, 1 | (payload ? 5 : 1 + below(c, 8)) << 16);
	put32(at + 32, any_value(c) & 3);
	put32(at + 36, any_value(c));
	put32(at + 40, any_value(c) & 0xffff);
	if (payload)
		part(c, r, payload, 0);
}

/* A request that the queue's device may well carry out. */
static void sensible(struct chance *c, struct target *t, u16 queue, struct request *r)
{
	switch (t->type) {
	case NET:
		return net(c, t, queue, r);
	case BLK:
		return disk(c, r);
	case BALLOON:
		return balloon(c, queue, r);
	case VSOCK:
		return vsock(c, queue, r);
	case CONSOLE:
		part(c, r, below(c, 4 * KIB), queue % 2 ? 0 : WRITE);
		return;
	default:
		part(c, r, below(c, 64 * KIB), WRITE);
	}
}

/* Something is wrong with one part, or with all. */
static void spoil(struct chance *c, struct request *r)
{
	struct part *p = &r->part[below(c, r->n)];
	switch (below(c, 6)) {
	case 0:
		p->address = any_address(c);
		break;
	case 1:
		p->length = any_length(c);
		break;
	case 2:
		p->flags ^= WRITE;
		break;
	case 3:
		p->flags ^= draw(c) & (WRITE | INDIRECT | NEXT);
		break;
	case 4:
		r->n = 1 + below(c, r->n);
		break;
	default:
		put32(p->address + (below(c, 48) & -4UL), any_value(c));
	}
}

static void compose(struct chance *c, struct target *t, u16 queue, struct request *r)
{
	r->n = 0;
	sensible(c, t, queue, r);
	if (t->manner == RUDE)
		for (u64 n = below(c, 4); n; n--)
			spoil(c, r);
	else if (t->manner == ODD && below(c, 8) == 0)
		spoil(c, r);
}

/* Fills one descriptor; the last two fields change places in a packed ring. */
static void descriptor(u64 at, const struct part *p, u16 flags, u16 other, bool packed)
{
	put32(at, p->address);
	put32(at + 4, p->address >> 32);
	put32(at + 8, p->length);
	put16(at + 12, packed ? other : p->flags | flags);
	put16(at + 14, packed ? p->flags | flags : other);
}

/* Writes the parts to a ring or a table of that size. more: flags of all of them. */
static void chain(struct chance *c, struct target *t, const struct request *r, u64 table, u32 size, u16 place, u16 more)
{
	for (u32 i = 0; i < r->n; i++) {
		u16 next = (place + i + 1) % size, flags = more | (i + 1 < r->n ? NEXT : 0);
		if (t->manner == RUDE && below(c, 64) == 0)
			next = any_value(c); /* out of range, or round and round */
		descriptor(table + 16UL * ((place + i) % size), &r->part[i], flags, t->packed ? place : next, t->packed);
	}
}

/* Whether a driver with manners has to wait until the device has used a request. */
static bool full(const struct target *t, const struct ring *r, u16 place)
{
	if (t->manner == RUDE)
		return false;
	if (!t->packed)
		return (u16)(r->index - get16(r->device + 2)) >= r->size / PARTS;
	u16 flags = get16(r->descriptors + 16UL * place + 14);
	return !(flags & AVAILABLE) != !(flags & USED);
}

static void add(struct chance *c, struct target *t, u16 queue)
{
	struct ring *r = &t->ring[queue];
	u32 size = r->size ? r->size : 1;
	u16 place = t->packed ? r->index % size : t->manner == RUDE ? below(c, size) : r->index * PARTS % size;
	u16 used = 1, more = !t->packed ? 0 : r->wrap ? AVAILABLE : USED;
	if (full(t, r, place))
		return;
	struct request request;
	compose(c, t, queue, &request);
	/* A driver with manners has all requests of a packed ring of the same length. */
	if (below(c, 4) == 0 || (t->packed && t->manner != RUDE)) {
		struct part table = {t->manner == RUDE ? any_address(c) & -16UL : (DATA + below(c, MIB)) & -256UL, 16 * request.n, INDIRECT};
		if (t->manner == RUDE && below(c, 32) == 0)
			table.length = any_length(c);
		chain(c, t, &request, table.address, 1 << 16, 0, 0);
		descriptor(r->descriptors + 16UL * place, &table, more, place, t->packed);
	} else {
		chain(c, t, &request, r->descriptors, size, place, more);
		used = request.n;
	}
	if (t->packed) {
		if (place + used >= (u16)size)
			r->wrap = !r->wrap;
		r->index = (place + used) % size;
		return;
	}
	bool odd = t->manner == RUDE && below(c, 64) == 0;
	put16(r->driver + 4 + 2UL * (r->index % size), odd ? any_value(c) : place);
	r->index += odd ? any_value(c) : 1;
	put16(r->driver + 2, r->index);
}

void target_work(struct chance *c, struct target *t)
{
	u16 queue = below(c, TARGET_QUEUES);
	if (t->queues && (t->manner != RUDE || below(c, 16)))
		queue %= t->queues;
	for (u64 n = 1 + below(c, 16); n; n--)
		add(c, t, queue);
	u64 base = bar_address(t, t->common_bar);
	if (base)
		mmio_write16(base + t->notify + 4 * queue, queue);
}
