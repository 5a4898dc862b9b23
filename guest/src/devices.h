/* The drivers. Only CPU 0 runs them, one step at a time between its batches of work. They never wait. */
#ifndef DEVICES_H
#define DEVICES_H

#include "page.h"
#include "print.h"
#include "virtio.h"

void devices_init(void);                   /* finds the devices; prints a line for each */
void devices_step(u64 now, u64 *next);
void devices_count(struct line *l);        /* appends the devices' counters to the tick line */

/* disk.c: writes pages to a disk, flushes it, reads the pages back and checks them, repeatedly. */
extern struct virtio disk_device;
void disk_init(void);
void disk_step(u64 now, u64 *next);
u64 disk_pages(void);          /* size of a writable disk, or 0 */
void disk_use(u64 pages);      /* uses this many pages, from the beginning */
void disk_pace(u64 per_second); /* pages; 0: as fast as possible */
extern u64 disk_writes, disk_reads, disk_bad; /* pages */

/* net.c: answers ARP, ping and UDP port 7. */
extern struct virtio net_device;
void net_init(void);
void net_step(u64 now, u64 *next);
void net_address(u32 ip); /* 10.9.0.2 is 0x0a090002; 0: none */
extern u64 net_received, net_sent, net_announced;

/* balloon.c and hint.c: the balloon. Its memory is the pool's. */
extern struct virtio balloon_device;
void balloon_init(void);
void balloon_step(u64 now, u64 *next);
extern u64 balloon_pages, reported_pages; /* pages in the balloon now; pages reported since boot */
extern bool reports_wanted;

void hint_init(struct virtio *d);
void hint_command(u32 id); /* a new command id of the device */
void hint_step(u64 *next);
extern u64 hinted_pages, hint_rounds;
extern u64 hint_race; /* one of this many hinted blocks is taken back immediately; 0: none */
extern bool hints_wanted;

#endif
