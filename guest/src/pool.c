/*
 * The pool's blocks. Only CPU 0 changes notes; the other CPUs fill the blocks of a job. A block is filled by a job, or
 * immediately if hint.c takes it back. Before it is freed, every page is checked.
 */
#include "pool.h"
#include "serial.h"
#include "version.h"
#include "work.h"

#define BATCH 32

/* Versions of pool pages have bit 50 set, which prints as 1024.N. Each version is used once. */
#define FIRST_POOL_VERSION ((1UL << POOL_VERSION_BIT) + 1)

struct block pool[MAX_BLOCKS];
u32 pool_blocks;
u64 pool_pages, pool_keep, pool_churn, pool_checked, pool_retaken, pool_zeroed, pool_stale;

u32 pool_mismatches;
u64 pool_told;

static u64 in_state[NOTE_STATE + 1]; /* pages */
static u64 retaken;                  /* pages of full blocks with NOTE_RETAKEN */
static u64 last_version = FIRST_POOL_VERSION - 1;

/*
 * All CPUs fill blocks: a job is a list of blocks, from which each CPU takes the next one. The list and its length change
 * only when all of its blocks are full.
 */
static u16 job[MAX_BLOCKS];
static u64 job_word; /* length << 32 | next to take */
static u32 job_done;
static bool job_runs;
static struct hand {
	struct block *block; /* the block that this CPU fills */
	u32 page;
} hands[MAX_CPUS];

/*
 * A block's note says what its pages must be. There are too many notes for registers, so they are in memory; but their
 * sum is only in r13 (version.h). The sum over stale notes, which a migration has not sent, differs from it.
 */
static u64 mix(u64 block, u64 note)
{
	u64 x = note * 0x9e3779b97f4a7c15UL + block * 0xbf58476d1ce4e5b9UL + 1;
	x ^= x >> 29;
	x *= 0xd6e8feb86659fd93UL;
	return x ^ x >> 32;
}

static void set_note(struct block *b, u64 note)
{
	u64 i = b - pool;
	in_state[block_state(b)] -= b->pages;
	notes_sum += mix(i, note) - mix(i, b->note);
	b->note = note;
	in_state[block_state(b)] += b->pages;
}

static bool notes_add_up(void)
{
	u64 sum = 0;
	for (u32 i = 0; i < pool_blocks; i++)
		sum += mix(i, pool[i].note);
	return sum == notes_sum;
}

u64 pool_count(u32 state)
{
	return in_state[state];
}

void block_become(struct block *b, u32 state)
{
	set_note(b, (b->note & ~(u64)NOTE_STATE) | state);
}

void block_flag(struct block *b, u64 set, u64 clear)
{
	set_note(b, (b->note & ~clear) | set);
}

/* Uses the last pages of RAM, in blocks that begin at multiples of 4 MiB. Fills the table from its end. */
bool pool_make(u64 pages)
{
	u32 at = MAX_BLOCKS;
	u64 left = pages;
	for (u32 i = ram_extents; i-- > 0 && left;) {
		u64 end = (ram[i].gpa >> PAGE_SHIFT) + ram[i].pages, start = ram[i].gpa >> PAGE_SHIFT;
		if (ram[i].pages > left)
			start = end - left;
		left -= end - start;
		while (end > start) {
			u64 from = (end - 1) & -(u64)BLOCK_PAGES;
			if (from < start)
				from = start;
			if (at == 0)
				return false;
			pool[--at] = (struct block){.first = from, .pages = end - from};
			end = from;
		}
	}
	if (left)
		return false;
	pool_blocks = MAX_BLOCKS - at;
	pool_pages = pages;
	for (u32 i = 0; i < pool_blocks; i++) {
		pool[i] = pool[at + i];
		pool[i].note = pool[i].old = 0;
		notes_sum += mix(i, 0);
		in_state[BLOCK_FREE] += pool[i].pages;
	}
	for (u32 i = 0; i < pool_blocks; i++)
		block_take(&pool[i]);
	return true;
}

static void check_page(struct block *b, u32 i)
{
	if (!page_good(block_page(b, i), b->first + i, block_version(b), 0))
		worker_found_bad(&workers[0], (u64)block_page(b, i), block_version(b), 0);
}

void block_free(struct block *b)
{
	for (u32 i = 0; i < b->pages; i++)
		check_page(b, i);
	pool_checked += b->pages;
	if (b->note & NOTE_RETAKEN)
		retaken -= b->pages;
	set_note(b, block_version(b) << NOTE_VERSION_SHIFT | BLOCK_FREE);
}

void block_take(struct block *b)
{
	b->old = block_version(b);
	set_note(b, ++last_version << NOTE_VERSION_SHIFT | (b->note & (NOTE_REPORTED | NOTE_HINTED)) | BLOCK_TAKING);
}

/*
 * Checks a page that was free. It must be as it was when it was freed, or all zeros if the host may have freed it.
 */
static void look_before_writing(struct worker *w, const struct block *b, u32 i)
{
	if (!b->old)
		return; /* never filled */
	void *page = block_page(b, i);
	bool given = (b->note & NOTE_REPORTED) || i < b->given;
	if ((given || (b->note & NOTE_HINTED)) && page_good(page, 0, 1, 1)) { /* all zeros */
		if (given)
			__atomic_fetch_add(&pool_zeroed, 1, __ATOMIC_RELAXED);
		return;
	}
	if (!page_good(page, b->first + i, b->old, 0))
		worker_found_bad(w, (u64)page, b->old, 0);
	else if (given)
		__atomic_fetch_add(&pool_stale, 1, __ATOMIC_RELAXED);
}

static void fill_page(u32 cpu, struct block *b, u32 i)
{
	look_before_writing(&workers[cpu], b, i);
	page_write(block_page(b, i), b->first + i, block_version(b), 0);
}

static void filled(struct block *b, u64 flag)
{
	b->given = 0;
	set_note(b, block_version(b) << NOTE_VERSION_SHIFT | flag | BLOCK_FULL);
}

void block_retake(struct block *b)
{
	block_take(b);
	for (u32 i = 0; i < b->pages; i++)
		fill_page(0, b, i);
	filled(b, NOTE_RETAKEN);
	retaken += b->pages;
	pool_retaken += b->pages;
}

static struct block *next_of_job(void)
{
	u64 word = __atomic_load_n(&job_word, __ATOMIC_ACQUIRE);
	while ((u32)word < word >> 32)
		if (__atomic_compare_exchange_n(&job_word, &word, word + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			return &pool[job[(u32)word]];
	return 0;
}

bool pool_assist(u32 cpu)
{
	struct hand *h = &hands[cpu];
	if (!h->block) {
		h->block = next_of_job();
		h->page = 0;
	}
	if (!h->block)
		return false;
	for (u32 i = 0; i < BATCH && h->page < h->block->pages; i++)
		fill_page(cpu, h->block, h->page++);
	if (h->page == h->block->pages) {
		h->block = 0;
		__atomic_fetch_add(&job_done, 1, __ATOMIC_RELEASE);
	}
	return true;
}

static void start_job(void)
{
	u32 n = 0;
	for (u32 i = 0; i < pool_blocks; i++)
		if (block_state(&pool[i]) == BLOCK_TAKING)
			job[n++] = i;
	job_done = 0;
	job_runs = true;
	__atomic_store_n(&job_word, (u64)n << 32, __ATOMIC_RELEASE);
	for (u32 cpu = 1; cpu < machine.cpus && cpu < n; cpu++)
		cpu_wake(cpu);
}

/* Ends a job when it is done, and starts one if there are blocks to fill. */
static void run_jobs(u64 now, u64 *next)
{
	u32 n = job_word >> 32;
	if (job_runs && __atomic_load_n(&job_done, __ATOMIC_ACQUIRE) == n) {
		for (u32 i = 0; i < n; i++)
			filled(&pool[job[i]], 0);
		job_runs = false;
	}
	if (job_runs)
		sooner(next, now + clock_ms(1));
	else if (in_state[BLOCK_TAKING])
		start_job();
}

static struct block *find(u32 state, u32 *at)
{
	for (u32 tries = 0; tries < pool_blocks; tries++) {
		if (++*at >= pool_blocks)
			*at = 0;
		struct block *b = &pool[*at];
		if (block_state(b) == state && !(b->note & NOTE_RETAKEN))
			return b;
	}
	return 0;
}

/* Fills or frees a block if the full pages are fewer than pool_keep, or at least a block more. */
static bool adjust_full(void)
{
	u64 full = in_state[BLOCK_FULL] - retaken;
	struct block *b = 0;
	if (full >= pool_keep + BLOCK_PAGES) {
		for (u32 i = pool_blocks; !b && i-- > 0;)
			if (block_state(&pool[i]) == BLOCK_FULL && !(pool[i].note & NOTE_RETAKEN))
				b = &pool[i];
		if (b)
			block_free(b);
	} else if (full + in_state[BLOCK_TAKING] < pool_keep && in_state[BLOCK_FREE]) {
		for (u32 i = 0; !b && i < pool_blocks; i++)
			if (block_state(&pool[i]) == BLOCK_FREE)
				b = &pool[i];
		block_take(b);
	}
	return b;
}

/* Takes a free block and frees a full one, in order of their addresses. */
static void churn(u64 now, u64 *next)
{
	static u64 due;
	static u32 free_at, full_at;
	if (!pool_churn)
		return;
	u64 interval = mul_div(tsc_hz, BLOCK_PAGES, pool_churn);
	if (is_due(now, &due, interval)) {
		due = now + interval;
		struct block *taken = in_state[BLOCK_FREE] ? find(BLOCK_FREE, &free_at) : 0;
		struct block *freed = find(BLOCK_FULL, &full_at);
		if (taken)
			block_take(taken);
		if (freed)
			block_free(freed);
	}
	sooner(next, due);
}

static void walk(u64 now, u64 *next)
{
	static u64 due;
	static u32 at, page; /* at == pool_blocks: not walking */
	static bool walking;
	if (!settings.walk_every)
		return;
	if (!walking && is_due(now, &due, settings.walk_every)) {
		walking = true;
		at = page = 0;
		due = now + settings.walk_every;
		if (!notes_add_up())
			pool_mismatches++;
	}
	while (walking && block_state(&pool[at]) != BLOCK_FULL) {
		page = 0;
		walking = ++at < pool_blocks;
	}
	if (!walking) {
		sooner(next, due);
		return;
	}
	struct block *b = &pool[at];
	u32 i = 0;
	for (; i < BATCH && page < b->pages; i++, page++)
		check_page(b, page);
	pool_checked += i;
	if (page == b->pages) {
		page = 0;
		walking = ++at < pool_blocks;
	}
	*next = now;
}

/* "pool of 128M is ready in 1.441 s: 32908K full, 94068K free", when the pool has reached its target. */
static void announce(u64 now)
{
	static struct line l;
	if (!pool_told || in_state[BLOCK_TAKING])
		return;
	put(&l, "pool of ");
	put_size(&l, pool_pages * PAGE);
	put(&l, " is ready in ");
	put_decimals(&l, mul_div(now - pool_told, 1000, tsc_hz), 3);
	put(&l, " s: ");
	put_size(&l, in_state[BLOCK_FULL] * PAGE);
	put(&l, " full, ");
	put_size(&l, (pool_pages - in_state[BLOCK_FULL]) * PAGE);
	put(&l, " free");
	serial_line(&l);
	pool_told = 0;
}

void pool_step(u64 now, u64 *next)
{
	if (!pool_blocks)
		return;
	run_jobs(now, next);
	if (adjust_full())
		*next = now;
	else
		announce(now);
	churn(now, next);
	walk(now, next);
}
