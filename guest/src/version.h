/*
 * The proof that no page is lost. The version that each page must have follows from two counters that live in
 * registers of their CPU, and nowhere else, from boot to power-off: no C function may use r13 to r15 for anything
 * else (-ffixed-r13 and so on), and ring 0 never stores them. A migration carries them with the vCPU's registers, so
 * a page that it fails to carry is compared with counters that did arrive, and not with a note in memory that may have
 * been left behind together with the page.
 *
 * A CPU rewrites the first n pages of its part in order, over and over: `pass` is the version of the pages that this
 * round has not reached, and pages before `cursor` are one version on. Pages past n keep the version that the fill gave
 * them. A version's upper bits count the fills, so no later fill repeats an earlier version; its first is odd.
 */
#ifndef VERSION_H
#define VERSION_H

#include "guest.h"

register u64 cursor __asm__("r14");
register u64 pass __asm__("r15");

/* The sum over the pool's notes, CPU 0's (pool.c). It is no counter, but kept in the same way and for the same reason. */
register u64 notes_sum __asm__("r13");

#define POOL_VERSION_BIT 50
#define FILL_SHIFT 40
#define FIRST_OF_FILL(fill) ((u64)(fill) << FILL_SHIFT | 1)
#define FIRST_VERSION(version) (((version) >> FILL_SHIFT << FILL_SHIFT) | 1)

#endif
