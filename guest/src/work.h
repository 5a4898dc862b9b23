/* The plan that CPU 0 makes, and the workers, one a CPU, that carry it out. */
#ifndef WORK_H
#define WORK_H

#include "page.h"

/* Written by CPU 0, and only while every worker has adopted the one before (plan_publish). */
struct plan {
	u32 generation;
	u32 fill;       /* counts the fills; another number: fill again */
	u64 owned;      /* pages, of all workers together, as the next two */
	u64 dirty;      /* of those, the ones to rewrite */
	bool writing;   /* rewrite them now */
	u64 rate;       /* pages a second; 0: flat out */
	u64 walk_every; /* TSC cycles between the starts of two verifications; 0: never */
	u64 zeros;
};
extern struct plan plan;
void plan_publish(const struct plan *next);

/* A run of a worker's pages that is contiguous in guest memory. */
struct part {
	u64 first; /* index of its first page among the worker's */
	u64 gpa;
};

#define REPORTS 16

/* Everything here is written by the worker's own CPU, but for what CPU 0 takes out: report_head and gap. */
struct worker {
	u32 id;
	volatile u32 generation; /* of the plan that it follows */
	volatile u32 fill;       /* that it has begun */
	volatile u32 filled;     /* that it has finished */
	bool filling;

	u64 pages, dirty, zeros; /* its share of the plan */
	u32 parts;
	struct part part[MAX_EXTENTS];

	volatile bool writing;
	u64 interval, due;  /* TSC: between two writes, 0 flat out; of the next */
	volatile u64 last;  /* TSC after the last write */
	volatile u64 gap;   /* the longest between two writes, since CPU 0 took it */

	bool walking;
	u64 walk_at, walk_every, walk_due;

	volatile u64 writes, verified, bad;
	volatile u32 report_head, report_tail; /* both count up for ever */
	struct finding report[REPORTS];

	u64 timer; /* TSC cycles that its timer is set to */
} __attribute__((aligned(64)));
extern struct worker workers[MAX_CPUS];

void worker_adopt(struct worker *w);
bool worker_step(struct worker *w, u64 *next); /* one batch of work; false if it had none before *next (lowered) */
void worker_found_bad(struct worker *w, u64 gpa, u64 version, u64 zeros); /* counts it, and reports it if it may */
void worker_sleep(struct worker *w, u64 until);

/*
 * Whether a deadline has come. One that lies further ahead than its period cannot be right (the TSC went back, which it
 * must not) and is brought near.
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
