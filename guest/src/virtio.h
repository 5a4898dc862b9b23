/* The driver's side of virtio 1.2: split queues (2.7) over PCI (4.1). Only CPU 0 uses it. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "pci.h"

#define QUEUE_SIZE 128 /* the most that is used of a queue */

enum { VIRTIO_NET = 1, VIRTIO_BLK = 2, VIRTIO_BALLOON = 5 }; /* section 5 */

/* One piece of a request's memory; all memory is identity-mapped. */
struct piece {
	const volatile void *at;
	u32 length;
};

struct queue {
	struct {
		u64 address;
		u32 length;
		u16 flags, next;
	} descriptor[QUEUE_SIZE] __attribute__((aligned(16)));
	struct {
		u16 flags, index, ring[QUEUE_SIZE];
	} available;
	struct {
		u16 flags, index;
		struct {
			u32 id, length;
		} ring[QUEUE_SIZE];
	} used __attribute__((aligned(4)));
	u32 token[QUEUE_SIZE]; /* of the request that begins at this descriptor */
	u16 size, index;
	u16 free, room; /* the first free descriptor, and how many there are */
	u16 taken;      /* used elements seen, counted for ever */
	u64 notify;     /* MMIO address */
};

struct virtio {
	bool there; /* found, and every step of its start went well */
	u64 features;
	u64 common, notify, config; /* MMIO addresses; config 0: there is none */
	u32 notify_step;
	struct function function;
	u32 line;     /* its first entry in device_interrupts */
	u32 messages; /* MSI-X entries in use: 2, 1 (both in one), 0: it must be looked at */
	u32 seen;     /* configuration interrupts */
	u32 generation; /* of the configuration, when it was last read; more than 8 bits: never */
	u64 look_due;
};

/* Interrupts by vector, counted by trap.S: of a device's configuration, then of its queues. */
extern volatile u32 device_interrupts[DEVICE_VECTORS];

/* Finds a device, resets it, and accepts what it offers of the wanted features; false: there is none that works. */
bool virtio_open(struct virtio *d, u16 type, u64 wanted, u32 line);
bool virtio_queue(struct virtio *d, struct queue *q, u16 index); /* sets a queue up; false: the device has no such queue */
u16 virtio_queues(struct virtio *d);
void virtio_start(struct virtio *d);
bool virtio_changed(struct virtio *d, u64 now, u64 *next); /* may the configuration have changed? */
u32 virtio_config32(struct virtio *d, u32 offset);

/* The request's readable pieces come first; false if there is no room. */
bool queue_add(struct queue *q, const struct piece *pieces, u32 readable, u32 writable, u32 token);
void queue_kick(struct queue *q);
bool queue_take(struct queue *q, u32 *token, u32 *length);

#endif
