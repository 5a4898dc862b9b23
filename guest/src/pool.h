/*
 * The pool: memory that is allocated and freed, like an operating system's. It is divided into blocks of up to 4 MiB,
 * each of them free or full of checked pages. Free blocks are for the balloon, for reports and for hints.
 */
#ifndef POOL_H
#define POOL_H

#include "page.h"

#define BLOCK_PAGES 1024 /* 4 MiB: Linux's largest free block */
#define MAX_BLOCKS 8192

enum block_state {
	BLOCK_FREE,      /* unused; the host may change its content */
	BLOCK_TAKING,    /* a CPU fills it */
	BLOCK_FULL,
	BLOCK_HINTED,    /* free, and hinted under an id before DONE */
	BLOCK_REPORTING, /* free, and in a report that the device has not used yet */
	BLOCK_BALLOON,
};

#define NOTE_STATE 0x0f
#define NOTE_REPORTED 0x10  /* free, and the device has used the report */
#define NOTE_RETAKEN 0x20   /* full, because it was taken back after it was hinted */
#define NOTE_HINTED 0x40    /* hinted since it was freed */
#define NOTE_VERSION_SHIFT 8

struct block {
	u64 note;  /* state, flags, and the version of its pages, or their last version if not full; 0: never filled */
	u64 old;   /* while it is filled: its version before */
	u32 first; /* number of its first page */
	u16 pages;
	u16 given; /* number of its first pages that have been in the balloon since it was full */
};
extern struct block pool[MAX_BLOCKS]; /* ascending */
extern u32 pool_blocks;
extern u64 pool_pages;

extern u64 pool_keep;    /* pages that stay full */
extern u64 pool_churn;   /* pages per second that are taken, and as many that are freed */
extern u64 pool_checked, pool_retaken; /* pages, since boot */
extern u64 pool_zeroed, pool_stale; /* pages that had been reported or in the balloon: found as zeros, or with their old content */
extern u32 pool_mismatches; /* times that the sum of the notes was not notes_sum */

extern u64 pool_told;    /* TSC when pool= or keep= changed its target; 0: it has reached and printed it */

bool pool_make(u64 pages); /* false: too large or fragmented; nothing has changed */
void pool_step(u64 now, u64 *next);
bool pool_assist(u32 cpu); /* fills a batch of pages, on any CPU; false: there is nothing to fill */

static inline u32 block_state(const struct block *b) { return b->note & NOTE_STATE; }
static inline u64 block_version(const struct block *b) { return b->note >> NOTE_VERSION_SHIFT; }
static inline void *block_page(const struct block *b, u32 page) { return (void *)((u64)(b->first + page) << PAGE_SHIFT); }
u64 pool_count(u32 state); /* pages in blocks of this state */
void block_become(struct block *b, u32 state); /* keeps version and flags */
void block_flag(struct block *b, u64 set, u64 clear);
void block_free(struct block *b);   /* checks and frees it */
void block_take(struct block *b);   /* marks it to be filled */
void block_retake(struct block *b); /* takes and fills it immediately, on this CPU */

#endif
