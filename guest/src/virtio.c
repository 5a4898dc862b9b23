/* The transport, then the queues. A device that fails during its start is not used. */
#include "virtio.h"
#include "work.h"

#define VENDOR 0x1af4
#define DEVICE_MODERN 0x1040 /* plus the type, section 4.1.2 */

/* Section 4.1.4: vendor-specific PCI capabilities, with a type in byte 3. */
#define CAPABILITY_VENDOR 0x09
enum { CAP_COMMON = 1, CAP_NOTIFY = 2, CAP_DEVICE = 4 };

/* Section 4.1.4.3. */
#define COMMON_FEATURE_SELECT 0
#define COMMON_FEATURES 4
#define COMMON_DRIVER_SELECT 8
#define COMMON_DRIVER_FEATURES 12
#define COMMON_CONFIG_VECTOR 16
#define COMMON_QUEUES 18
#define COMMON_STATUS 20
#define COMMON_GENERATION 21
#define COMMON_QUEUE_SELECT 22
#define COMMON_QUEUE_SIZE 24
#define COMMON_QUEUE_VECTOR 26
#define COMMON_QUEUE_ENABLE 28
#define COMMON_QUEUE_NOTIFY 30
#define COMMON_QUEUE_DESCRIPTORS 32
#define COMMON_QUEUE_AVAILABLE 40
#define COMMON_QUEUE_USED 48

/* Section 2.1. */
#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER 2
#define STATUS_DRIVER_OK 4
#define STATUS_FEATURES_OK 8
#define STATUS_FAILED 128

#define FEATURE_VERSION_1 (1UL << 32)

#define DESCRIPTOR_NEXT 1
#define DESCRIPTOR_WRITE 2
#define USED_NO_NOTIFY 1

#define LOOK_MS 20  /* poll interval of a device without MSI-X */
#define TRUST_MS 1000 /* and of a device with MSI-X */

static bool find_capabilities(struct virtio *d)
{
	for (u8 at = 0; (at = pci_capability(d->function, CAPABILITY_VENDOR, at));) {
		u8 type = pci_read8(d->function, at + 3);
		if (type != CAP_COMMON && type != CAP_NOTIFY && type != CAP_DEVICE)
			continue;
		u64 bar = pci_bar(d->function, pci_read8(d->function, at + 4));
		if (!bar)
			continue;
		u64 place = bar + pci_read(d->function, at + 8);
		if (type == CAP_COMMON && !d->common) {
			d->common = place;
		} else if (type == CAP_NOTIFY && !d->notify) {
			d->notify = place;
			d->notify_step = pci_read(d->function, at + 16);
		} else if (type == CAP_DEVICE && !d->config) {
			d->config = place;
		}
	}
	return d->common && d->notify;
}

static u64 offered(struct virtio *d)
{
	mmio_write32(d->common + COMMON_FEATURE_SELECT, 0);
	u64 low = mmio_read32(d->common + COMMON_FEATURES);
	mmio_write32(d->common + COMMON_FEATURE_SELECT, 1);
	return low | (u64)mmio_read32(d->common + COMMON_FEATURES) << 32;
}

static void add_status(struct virtio *d, u8 bits)
{
	mmio_write8(d->common + COMMON_STATUS, mmio_read8(d->common + COMMON_STATUS) | bits);
}

bool virtio_open(struct virtio *d, u16 type, u64 wanted, u32 line)
{
	u16 transitional = type == VIRTIO_BALLOON ? 0x1002 : 0x0fff + type;
	d->line = line;
	if (!pci_find(VENDOR, DEVICE_MODERN + type, transitional, &d->function))
		return false;
	pci_enable(d->function);
	if (!find_capabilities(d))
		return false;
	mmio_write8(d->common + COMMON_STATUS, 0);
	for (u32 polls = 0; mmio_read8(d->common + COMMON_STATUS) && polls < 100000; polls++)
		;
	add_status(d, STATUS_ACKNOWLEDGE);
	add_status(d, STATUS_DRIVER);
	d->features = offered(d) & (wanted | FEATURE_VERSION_1);
	mmio_write32(d->common + COMMON_DRIVER_SELECT, 0);
	mmio_write32(d->common + COMMON_DRIVER_FEATURES, d->features);
	mmio_write32(d->common + COMMON_DRIVER_SELECT, 1);
	mmio_write32(d->common + COMMON_DRIVER_FEATURES, d->features >> 32);
	add_status(d, STATUS_FEATURES_OK);
	if (!(mmio_read8(d->common + COMMON_STATUS) & STATUS_FEATURES_OK)) {
		add_status(d, STATUS_FAILED);
		return false;
	}
	u8 vectors[2] = {VEC_DEVICES + line, VEC_DEVICES + line + 1};
	d->messages = pci_msix(d->function, vectors, 2);
	d->there = true;
	d->generation = ~0U;
	if (d->messages) {
		mmio_write16(d->common + COMMON_CONFIG_VECTOR, 0);
		if (mmio_read16(d->common + COMMON_CONFIG_VECTOR) != 0)
			d->messages = 0;
	}
	return true;
}

u16 virtio_queues(struct virtio *d)
{
	return mmio_read16(d->common + COMMON_QUEUES);
}

static void write_address(u64 at, const void *address)
{
	mmio_write32(at, (u64)address);
	mmio_write32(at + 4, (u64)address >> 32);
}

bool virtio_queue(struct virtio *d, struct queue *q, u16 index)
{
	mmio_write16(d->common + COMMON_QUEUE_SELECT, index);
	u16 size = mmio_read16(d->common + COMMON_QUEUE_SIZE);
	if (!size)
		return d->there = false;
	if (size > QUEUE_SIZE)
		size = QUEUE_SIZE;
	q->size = q->room = size;
	q->index = index;
	for (u16 i = 0; i < size; i++)
		q->descriptor[i].next = i + 1;
	mmio_write16(d->common + COMMON_QUEUE_SIZE, size);
	if (d->messages) {
		u16 entry = d->messages - 1;
		mmio_write16(d->common + COMMON_QUEUE_VECTOR, entry);
		if (mmio_read16(d->common + COMMON_QUEUE_VECTOR) != entry)
			d->messages = 0;
	}
	write_address(d->common + COMMON_QUEUE_DESCRIPTORS, q->descriptor);
	write_address(d->common + COMMON_QUEUE_AVAILABLE, &q->available);
	write_address(d->common + COMMON_QUEUE_USED, &q->used);
	q->notify = d->notify + d->notify_step * mmio_read16(d->common + COMMON_QUEUE_NOTIFY);
	mmio_write16(d->common + COMMON_QUEUE_ENABLE, 1);
	return true;
}

void virtio_start(struct virtio *d)
{
	add_status(d, STATUS_DRIVER_OK);
}

/*
 * The configuration's generation is also polled, in case an interrupt was lost. The configuration is read only if its
 * generation has changed or after an interrupt: QEMU's balloon has command id 0, STOP, in it from the time when it has
 * read the driver's START, although it has not told the driver to stop.
 */
bool virtio_changed(struct virtio *d, u64 now, u64 *next)
{
	u64 period = clock_ms(d->messages ? TRUST_MS : LOOK_MS);
	u32 interrupts = device_interrupts[d->line];
	bool interrupted = interrupts != d->seen, due = is_due(now, &d->look_due, period);
	if (due)
		d->look_due = now + period;
	sooner(next, d->look_due);
	if (!due && !interrupted)
		return false;
	d->seen = interrupts;
	u32 generation = mmio_read8(d->common + COMMON_GENERATION);
	bool changed = generation != d->generation || (interrupted && d->messages == 2);
	d->generation = generation;
	return changed;
}

u32 virtio_config32(struct virtio *d, u32 offset)
{
	return d->config ? mmio_read32(d->config + offset) : 0;
}

bool queue_add(struct queue *q, const struct piece *pieces, u32 readable, u32 writable, u32 token)
{
	u32 n = readable + writable;
	if (n == 0 || n > q->room)
		return false;
	u16 head = q->free, at = head;
	for (u32 i = 0; i < n; i++) {
		at = i ? q->descriptor[at].next : head;
		q->descriptor[at].address = (u64)pieces[i].at;
		q->descriptor[at].length = pieces[i].length;
		q->descriptor[at].flags = (i + 1 < n ? DESCRIPTOR_NEXT : 0) | (i < readable ? 0 : DESCRIPTOR_WRITE);
	}
	q->free = q->descriptor[at].next;
	q->room -= n;
	q->token[head] = token;
	q->available.ring[q->available.index % q->size] = head;
	__atomic_store_n(&q->available.index, q->available.index + 1, __ATOMIC_RELEASE);
	return true;
}

void queue_kick(struct queue *q)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST); /* the index must be visible before the flag is read, section 2.7.13.4 */
	if (!(__atomic_load_n(&q->used.flags, __ATOMIC_RELAXED) & USED_NO_NOTIFY))
		mmio_write16(q->notify, q->index);
}

bool queue_take(struct queue *q, u32 *token, u32 *length)
{
	if (__atomic_load_n(&q->used.index, __ATOMIC_ACQUIRE) == q->taken)
		return false;
	u32 head = q->used.ring[q->taken % q->size].id;
	*length = q->used.ring[q->taken % q->size].length;
	q->taken++;
	if (head >= q->size) { /* the device has used a request that does not exist */
		*token = ~0U;
		return true;
	}
	*token = q->token[head];
	u16 at = head;
	for (q->room++; q->descriptor[at].flags & DESCRIPTOR_NEXT; q->room++)
		at = q->descriptor[at].next;
	q->descriptor[at].next = q->free;
	q->free = head;
	return true;
}
