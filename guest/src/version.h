/*
 * The proof that no page is stale. The version that each page must have follows from two counters, which are only in
 * registers of their CPU from boot to power-off: no C function may use r13 to r15 for anything else (-ffixed-r13 and so
 * on), and ring 0 never stores them. A migration sends them with the vCPU's registers. So a page that a migration has not
 * sent is compared with counters that it has sent, and not with a version in memory that may be stale like the page.
 *
 * A CPU rewrites the first n pages of its part in order, repeatedly: `pass` is the version of the pages that this round
 * has not reached, and pages before `cursor` have the next version. Pages after n keep the version of the fill. A
 * version's upper bits count the fills, so no fill repeats an earlier version; the first version of a fill is odd.
 */
#ifndef VERSION_H
#define VERSION_H

#include "guest.h"

register u64 cursor __asm__("r14");
register u64 pass __asm__("r15");

/* On CPU 0, the sum over the pool's notes (pool.c). It is in a register for the same reason. */
register u64 notes_sum __asm__("r13");

#define POOL_VERSION_BIT 50
#define FILL_SHIFT 40
#define FIRST_OF_FILL(fill) ((u64)(fill) << FILL_SHIFT | 1)
#define FIRST_VERSION(version) (((version) >> FILL_SHIFT << FILL_SHIFT) | 1)

#endif
