/* The hostile guest's driver side of virtio: capabilities, registers and queues. */
#include "hostile.h"

#define VENDOR 0x1af4
#define FIRST_ID 0x1040 /* of a device of type 0 */
#define CAP_VENDOR 0x09
#define CAP_MSIX 0x11

/* The common configuration, virtio 1.2, 4.1.4.3. */
enum {
	DEVICE_SELECT = 0, DEVICE_FEATURE = 4, DRIVER_SELECT = 8, DRIVER_FEATURE = 12, CONFIG_VECTOR = 16, QUEUES = 18, STATUS = 20,
	QUEUE_SELECT = 22, QUEUE_SIZE = 24, QUEUE_VECTOR = 26, QUEUE_ENABLE = 28, QUEUE_DESC = 32, QUEUE_RESET = 58, COMMON_SIZE = 64,
};
#define PACKED (1UL << 34)
#define VERSION_1 (1UL << 32)
#define RING_INDIRECT (1UL << 28)

static void find(struct function f, u16 type)
{
	struct target *t = &targets[target_count];
	t->function = f;
	t->type = type;
	for (u32 i = 0; i < 6; i++)
		t->bars[i] = pci_read(f, 0x10 + 4 * i);
	for (u8 at = 0; (at = pci_capability(f, CAP_VENDOR, at));) {
		u32 *places[] = {0, &t->common, &t->notify, &t->isr, &t->config};
		u8 kind = pci_read(f, at) >> 24;
		if (kind < 1 || kind > 4)
			continue;
		*places[kind] = pci_read(f, at + 8);
		t->common_bar = pci_read8(f, at + 4);
	}
	u8 at = pci_capability(f, CAP_MSIX, 0);
	if (at) {
		u32 place = pci_read(f, at + 4);
		t->vectors_bar = place & 7;
		t->vectors = place & ~7U;
		t->entries = (pci_read(f, at) >> 16 & 0x7ff) + 1;
	}
	target_count++;
}

void target_find(void)
{
	for (u32 slot = 0; slot < 32 && target_count < TARGETS; slot++) {
		struct function f = {0x80000000 | slot << 11};
		u32 id = pci_read(f, 0);
		if ((u16)id == VENDOR && id >> 16 > FIRST_ID)
			find(f, (id >> 16) - FIRST_ID);
	}
}

void target_repair(struct target *t)
{
	for (u32 i = 0; i < 6; i++) {
		outl(0xcf8, t->function.address | (0x10 + 4 * i));
		outl(0xcfc, t->bars[i]);
	}
	pci_enable(t->function);
}

static void message(struct chance *c, struct target *t, u64 base)
{
	u64 entry = base + t->vectors + 16 * below(c, t->entries + 1);
	mmio_write32(entry, 0xfee00000 | (below(c, 8) ? 0 : any_value(c) & 0xffffc));
	mmio_write32(entry + 4, below(c, 16) ? 0 : any_value(c));
	mmio_write32(entry + 8, below(c, 16) ? VEC_DEVICES + below(c, DEVICE_VECTORS) : any_value(c) & (reckless ? -1U : 0x80ff));
	mmio_write32(entry + 12, below(c, 4) == 0);
}

/* Mostly in the part for rings, and aligned. part: 0 to 2. */
static u64 ring_address(struct chance *c, struct target *t, u16 index, u32 part)
{
	if (t->manner != RUDE)
		return TIDY_RINGS + ((t - targets) * TARGET_QUEUES + index) * TIDY_RING + 8 * KIB * part;
	u64 at = below(c, 32) ? arena + below(c, RINGS) : any_address(c);
	return below(c, 64) ? at & -16UL : at;
}

static void set_queue(struct chance *c, struct target *t, u64 common, u16 index)
{
	struct ring *r = &t->ring[index];
	mmio_write16(common + QUEUE_SELECT, index);
	u16 most = mmio_read16(common + QUEUE_SIZE);
	if (t->manner != RUDE) {
		mmio_write16(common + QUEUE_SIZE, most < 256 ? most : 16U << below(c, 5));
	} else if (below(c, 3)) {
		u16 size = below(c, 16) ? 1U << below(c, 10) : any_value(c);
		mmio_write16(common + QUEUE_SIZE, size <= most || below(c, 16) == 0 ? size : most);
	}
	r->size = mmio_read16(common + QUEUE_SIZE);
	r->descriptors = ring_address(c, t, index, 0);
	r->driver = ring_address(c, t, index, 1);
	r->device = ring_address(c, t, index, 2);
	r->index = 0;
	r->wrap = true;
	for (u32 i = 0; i < 3; i++) {
		u64 at = (&r->descriptors)[i];
		if (t->manner != RUDE)
			memset((void *)at, 0, 8 * KIB);
		else if (at >= arena && at + 16 * KIB <= TIDY_RINGS && below(c, 8))
			memset((void *)at, 0, 16 * KIB);
		mmio_write32(common + QUEUE_DESC + 8 * i, at);
		mmio_write32(common + QUEUE_DESC + 8 * i + 4, at >> 32);
	}
	mmio_write16(common + QUEUE_VECTOR, below(c, 4) ? below(c, t->entries + 1) : any_value(c));
	if (t->manner != RUDE || below(c, 16))
		mmio_write16(common + QUEUE_ENABLE, 1);
}

void target_start(struct chance *c, struct target *t)
{
	t->manner = below(c, 3);
	if (t->manner != RUDE || below(c, 8))
		target_repair(t);
	u64 base = bar_address(t, t->common_bar), common = base + t->common, offered = 0;
	if (!base)
		return;
	if (t->manner != RUDE || below(c, 8))
		mmio_write8(common + STATUS, 0);
	mmio_write8(common + STATUS, 3);
	for (u32 i = 0; i < 2; i++) {
		mmio_write32(common + DEVICE_SELECT, i);
		offered |= (u64)mmio_read32(common + DEVICE_FEATURE) << 32 * i;
	}
	u64 taken = offered;
	if (t->manner == RUDE || below(c, 4) == 0)
		taken &= draw(c) | VERSION_1 | (t->manner == RUDE ? 0 : RING_INDIRECT);
	if (below(c, 2))
		taken &= ~PACKED;
	for (u32 i = 0; i < 2; i++) {
		mmio_write32(common + DRIVER_SELECT, i);
		mmio_write32(common + DRIVER_FEATURE, taken >> 32 * i);
	}
	mmio_write8(common + STATUS, 11);
	t->packed = taken & PACKED;
	u64 table = bar_address(t, t->vectors_bar);
	if (table && t->entries) {
		u8 at = pci_capability(t->function, CAP_MSIX, 0);
		for (u32 i = 0; i < 4; i++)
			message(c, t, table);
		if (at)
			config_write(c, t->function, at + 2, 2, below(c, 8) ? 0x8000 : any_value(c));
	}
	mmio_write16(common + CONFIG_VECTOR, below(c, t->entries + 1));
	t->queues = mmio_read16(common + QUEUES);
	for (u16 i = 0; i < t->queues && i < TARGET_QUEUES; i++)
		if (t->manner != RUDE || below(c, 8))
			set_queue(c, t, common, i);
	mmio_write8(common + STATUS, 15);
}

void target_requeue(struct chance *c, struct target *t)
{
	u64 base = bar_address(t, t->common_bar), common = base + t->common;
	if (!base)
		return;
	u16 index = below(c, TARGET_QUEUES);
	if (t->queues && below(c, 16))
		index %= t->queues;
	mmio_write16(common + QUEUE_SELECT, index);
	mmio_write16(common + QUEUE_RESET, 1);
	if (below(c, 4) && mmio_read16(common + QUEUE_RESET) == 0)
		set_queue(c, t, common, index);
}

void target_poke(struct chance *c, struct target *t)
{
	u64 base = bar_address(t, t->common_bar);
	if (!base)
		return;
	u64 places[] = {t->common, t->common, t->config, t->notify, t->isr};
	u64 at = base + places[below(c, 5)] + below(c, COMMON_SIZE);
	switch (below(c, 10)) {
	case 0:
		if ((base = bar_address(t, t->vectors_bar)))
			message(c, t, base);
		break;
	case 1:
		mmio_write8(base + t->common + STATUS, any_value(c) | 1); /* no reset: target_start makes enough of them */
		break;
	case 2:
		at = base + below(c, 16 * KIB);
		/* fall through */
	case 3:
		mmio_read32(at);
		break;
	case 4:
		mmio_write8(at, any_value(c));
		break;
	case 5:
		mmio_write16(at & -2UL, any_value(c));
		break;
	case 6: /* many of one kind */
		for (u64 n = below(c, 200); n; n--)
			mmio_write8(base + t->common + STATUS, n);
		break;
	case 7:
		__asm__ volatile("movq %0, (%1)" : : "r"(draw(c)), "r"(at & -8UL) : "memory");
		break;
	default:
		mmio_write32(at & -4UL, any_value(c));
	}
}
