/* The driver side of virtio 1.2: split queues (2.7) over PCI (4.1). Only CPU 0 uses it. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "pci.h"

#define QUEUE_SIZE 128 /* at most this many entries of a queue are used */

enum { VIRTIO_NET = 1, VIRTIO_BLK = 2, VIRTIO_BALLOON = 5 }; /* section 5 */

/* One part of a request's memory, which is identity-mapped. */
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
	u32 token[QUEUE_SIZE]; /* of the request that starts at this descriptor */
	u16 size, index;
	u16 free, room; /* the first free descriptor, and the number of free ones */
	u16 taken;      /* number of used elements that were taken; wraps */
	u64 notify;     /* MMIO address */
};

struct virtio {
	bool there; /* found and started without errors */
	u64 features;
	u64 common, notify, config; /* MMIO addresses; config 0: none */
	u32 notify_step;
	struct function function;
	u32 line;     /* index of its first entry in device_interrupts */
	u32 messages; /* MSI-X entries in use: 2, 1 (shared), or 0: poll */
	u32 seen;     /* configuration interrupts */
	u32 generation; /* of the configuration at the last read; more than 8 bits: never read */
	u64 look_due;
};

/* Number of interrupts by vector, counted by trap.S: for each device its configuration, then its queues. */
extern volatile u32 device_interrupts[DEVICE_VECTORS];

/* Finds and resets a device, and accepts the offered ones of the wanted features; false: no working device. */
bool virtio_open(struct virtio *d, u16 type, u64 wanted, u32 line);
bool virtio_queue(struct virtio *d, struct queue *q, u16 index); /* configures a queue; false: the device does not have it */
u16 virtio_queues(struct virtio *d);
void virtio_start(struct virtio *d);
bool virtio_changed(struct virtio *d, u64 now, u64 *next); /* returns whether the configuration may have changed */
u32 virtio_config32(struct virtio *d, u32 offset);

/* The device-readable pieces come first; false: no room. */
bool queue_add(struct queue *q, const struct piece *pieces, u32 readable, u32 writable, u32 token);
void queue_kick(struct queue *q);
bool queue_take(struct queue *q, u32 *token, u32 *length);

#endif
