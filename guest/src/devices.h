/* The drivers. CPU 0 alone runs them, a step at a time between its batches of work; none ever waits. */
#ifndef DEVICES_H
#define DEVICES_H

#include "page.h"
#include "print.h"
#include "virtio.h"

void devices_init(void);                   /* finds them; prints a line for each */
void devices_step(u64 now, u64 *next);
void devices_count(struct line *l);        /* what they add to the tick line */

/* disk.c: writes pages to a disk, flushes it, reads them back, checks them, and begins again. */
extern struct virtio disk_device;
void disk_init(void);
void disk_step(u64 now, u64 *next);
u64 disk_pages(void);          /* how many it has, or 0 */
void disk_use(u64 pages);      /* from its beginning; 0: none */
void disk_pace(u64 per_second); /* pages; 0: flat out */
extern u64 disk_writes, disk_reads, disk_bad; /* pages */

/* net.c: answers ARP, ping and UDP port 7. */
extern struct virtio net_device;
void net_init(void);
void net_step(u64 now, u64 *next);
void net_address(u32 ip); /* 10.9.0.2 is 0x0a090002; 0: none */
extern u64 net_received, net_sent, net_announced;

/* balloon.c and hint.c, the balloon; its memory is the pool's. */
extern struct virtio balloon_device;
void balloon_init(void);
void balloon_step(u64 now, u64 *next);
extern u64 balloon_pages, reported_pages; /* in the balloon now; reported since boot */
extern bool reports_wanted;

void hint_init(struct virtio *d);
void hint_command(u32 id); /* the device announces it */
void hint_step(u64 *next);
extern u64 hinted_pages, hint_rounds;
extern u64 hint_race; /* of so many hinted blocks one is taken back at once; 0: none */
extern bool hints_wanted;

#endif
