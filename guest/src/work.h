/* The settings, which CPU 0 changes, and the workers, one for each CPU, which follow them. */
#ifndef WORK_H
#define WORK_H

#include "page.h"

/* Written by CPU 0, and only after every worker has adopted the previous settings (settings_publish). */
struct settings {
	u32 generation;
	u32 fill;       /* number of the fill; when it changes, fill again */
	u64 owned;      /* pages of all workers, as are dirty and rate */
	u64 dirty;      /* number of owned pages to rewrite */
	bool writing;   /* rewrite them now */
	u64 rate;       /* pages per second; 0: as fast as possible */
	u64 walk_every; /* TSC cycles between the starts of two walks, which verify all pages; 0: never */
	u64 zeros;
};
extern struct settings settings;
void settings_publish(const struct settings *next);

/* A range of a worker's pages that is contiguous in guest memory. */
struct part {
	u64 first; /* index of its first page among the worker's pages */
	u64 gpa;
};

#define REPORTS 16

/* Only the worker's CPU writes these, except report_head and gap, which CPU 0 writes too. */
struct worker {
	u32 id;
	volatile u32 generation; /* of the settings that it follows */
	volatile u32 fill;       /* number of the last fill it has begun */
	volatile u32 filled;     /* number of the last fill it has finished */
	bool filling;

	u64 pages, dirty, zeros; /* its share of the settings */
	u32 parts;
	struct part part[MAX_EXTENTS];

	volatile bool writing;
	u64 interval, due;  /* TSC cycles between two writes, 0: none; TSC of the next write */
	volatile u64 last;  /* TSC after the last write */
	volatile u64 gap;   /* longest time between two writes since CPU 0 read it */

	bool walking;
	u64 walk_at, walk_every, walk_due;

	volatile u64 writes, verified, bad;
	volatile u32 report_head, report_tail; /* both wrap */
	struct finding report[REPORTS];

	u64 timer; /* TSC cycles of its timer */
} __attribute__((aligned(64)));
extern struct worker workers[MAX_CPUS];

void worker_adopt(struct worker *w);
bool worker_step(struct worker *w, u64 *next); /* does a batch of work; false: none is due before *next, which it lowers */
void worker_found_bad(struct worker *w, u64 gpa, u64 version, u64 zeros); /* counts the page, and reports it if there is room */
void worker_sleep(struct worker *w, u64 until);

/*
 * Returns whether a deadline has passed. If it is more than its period ahead, the TSC has gone back, and the deadline
 * is moved to one period from now.
 */
static inline bool is_due(u64 now, u64 *deadline, u64 period)
{
	if ((s64)(*deadline - now) > (s64)period)
		*deadline = now + period;
	return (s64)(now - *deadline) >= 0;
}

static inline void sooner(u64 *next, u64 deadline)
{
	if ((s64)(deadline - *next) < 0)
		*next = deadline;
}

#endif
