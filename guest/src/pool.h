/*
 * The pool: memory that comes and goes, as an operating system's does. It is divided into blocks of up to 4 MiB, each
 * of them free or full of pages that are checked; free ones are what the balloon may have, report and hint.
 */
#ifndef POOL_H
#define POOL_H

#include "page.h"

#define BLOCK_PAGES 1024 /* 4 MiB: the largest that Linux has free in one piece */
#define MAX_BLOCKS 8192

enum block_state {
	BLOCK_FREE,      /* what it holds is nobody's */
	BLOCK_TAKING,    /* some CPU fills it */
	BLOCK_FULL,
	BLOCK_HINTED,    /* free, and hinted under an id that has not been DONE */
	BLOCK_REPORTING, /* the device has been told that it is free and has not answered */
	BLOCK_BALLOON,
};

#define NOTE_STATE 0x0f
#define NOTE_REPORTED 0x10  /* free, and the device has answered */
#define NOTE_RETAKEN 0x20   /* full, but only since it was hinted */
#define NOTE_HINTED 0x40    /* hinted since it was freed */
#define NOTE_VERSION_SHIFT 8

struct block {
	u64 note;  /* state, flags, and the version of its pages: those that it has, or, not full, had last; 0: never any */
	u64 old;   /* while it is taken: the version that it had before */
	u32 first; /* number of its first page */
	u16 pages;
	u16 given; /* of its first pages, those that have been in the balloon since it was full */
};
extern struct block pool[MAX_BLOCKS]; /* ascending */
extern u32 pool_blocks;
extern u64 pool_pages;

extern u64 pool_keep;    /* pages that stay full */
extern u64 pool_churn;   /* pages a second that are taken, and as many freed */
extern u64 pool_checked, pool_retaken; /* pages, since boot */
extern u64 pool_zeroed, pool_stale; /* had been reported or in the balloon; found as zeros, or as they were, when taken */
extern u32 pool_lies; /* times that the notes did not add up */

extern u64 pool_told;    /* TSC when it was told to be something else; 0: it is that, and has said so */

bool pool_make(u64 pages); /* false, with nothing done: it cannot be so large, or so fragmented */
void pool_step(u64 now, u64 *next);
bool pool_assist(u32 cpu); /* a batch of filling, by any CPU; false: there is none */

static inline u32 block_state(const struct block *b) { return b->note & NOTE_STATE; }
static inline u64 block_version(const struct block *b) { return b->note >> NOTE_VERSION_SHIFT; }
static inline void *block_page(const struct block *b, u32 page) { return (void *)((u64)(b->first + page) << PAGE_SHIFT); }
u64 pool_count(u32 state); /* pages in blocks of that state */
void block_become(struct block *b, u32 state); /* keeps version and flags */
void block_flag(struct block *b, u64 set, u64 clear);
void block_free(struct block *b);   /* checks it, and frees it */
void block_take(struct block *b);   /* to be filled soon */
void block_retake(struct block *b); /* filled at once, by this CPU */

#endif
