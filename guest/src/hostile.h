/* The hostile guest: what its two files share. It keeps to no rule, and no value in it is safe from its other CPU. */
#ifndef HOSTILE_H
#define HOSTILE_H

#include "pci.h"

#define TARGETS 16
#define TARGET_QUEUES 8

/*
 * The arena begins with rings that lie over each other. Behind them each queue has a place of its own for a driver with
 * manners, and then comes what requests point to.
 */
#define RINGS (256 * KIB)
#define TIDY_RING (32 * KIB)
#define TIDY_RINGS (arena + RINGS)
#define DATA (TIDY_RINGS + TARGETS * TARGET_QUEUES * TIDY_RING)

/* How a device is treated from one reset to the next. */
enum manner {
	RUDE, /* anything */
	ODD,  /* good rings; most requests make sense */
	TIDY, /* and all of them, at first sight */
};

/* What a CPU does next follows from its state. */
struct chance {
	u64 state;
	u64 steps;
};

/* A queue as it was set up last. Addresses may be anywhere. */
struct ring {
	u64 descriptors, driver, device;
	u16 size, index; /* index: of the available ring, or the packed ring's next descriptor */
	bool wrap;
};

/* A virtio device. */
struct target {
	struct function function;
	u16 type;
	u32 bars[6];                              /* as the VMM placed them */
	u32 common, notify, isr, config, vectors; /* offsets in the BARs of their numbers below */
	u8 common_bar, vectors_bar;
	u32 entries; /* of the MSI-X table */
	u16 queues;
	bool packed;
	u8 manner;
	struct ring ring[TARGET_QUEUES];
};

extern struct target targets[TARGETS];
extern u32 target_count;
extern u64 arena, arena_end; /* memory that the guest may lose */
extern bool reckless;        /* it may also hurt its own program */

static inline u64 draw(struct chance *c)
{
	c->state ^= c->state >> 12;
	c->state ^= c->state << 25;
	c->state ^= c->state >> 27;
	return c->state * 0x2545f4914f6cdd1d;
}

static inline u64 below(struct chance *c, u64 n)
{
	return (draw(c) >> 16) % n;
}

/* print.c */
void *memset(void *to, int byte, u64 n);

/* hostile.c */
void config_write(struct chance *c, struct function f, u32 offset, u32 width, u32 value);
u64 bar_address(struct target *t, u32 index); /* 0: not mapped, or the guest would hurt itself */
u64 any_address(struct chance *c);
u32 any_value(struct chance *c);

/* hostiledevice.c */
void target_find(void);
void target_repair(struct target *t);                 /* BARs and command as a driver leaves them */
void target_start(struct chance *c, struct target *t); /* from reset to DRIVER_OK, with random choices */
void target_requeue(struct chance *c, struct target *t);
void target_poke(struct chance *c, struct target *t); /* one access to a register */

/* hostilerequest.c */
void target_work(struct chance *c, struct target *t); /* requests, and a kick */

#endif
