/* The work of every CPU: fill its share of the memory, rewrite it, verify it, sleep. */
#include "pool.h"
#include "work.h"
#include "version.h"

/* Pages in a batch, between two checks for other work: about 10 us. */
#define BATCH 32
#define FILL_BATCH 64

/* The longest sleep, also after a lost wake-up. */
#define IDLE_MS 1000

struct settings settings;
struct worker workers[MAX_CPUS];

void settings_publish(const struct settings *next)
{
	for (u32 cpu = 1; cpu < machine.cpus; cpu++)
		while (workers[cpu].generation != settings.generation)
			__builtin_ia32_pause();
	u32 generation = settings.generation + 1;
	u32 published = settings.generation;
	settings = *next;
	settings.generation = published; /* until all fields are written */
	__atomic_store_n(&settings.generation, generation, __ATOMIC_RELEASE);
	for (u32 cpu = 1; cpu < machine.cpus; cpu++)
		cpu_wake(cpu);
}

/* The first `total % cpus` workers have one page more, so a worker's share never shrinks when total grows. */
static u64 share(u64 total, u32 id)
{
	return total / machine.cpus + (id < total % machine.cpus);
}

/* Finds the worker's pages in guest memory, after those of the workers before it. */
static void take_part(struct worker *w)
{
	u64 skip = 0, taken = 0;
	for (u32 id = 0; id < w->id; id++)
		skip += share(settings.owned, id);
	w->pages = share(settings.owned, w->id);
	w->parts = 0;
	for (u32 i = 0; i < ram_extents && taken < w->pages; i++) {
		if (skip >= ram[i].pages) {
			skip -= ram[i].pages;
			continue;
		}
		w->part[w->parts++] = (struct part){taken, ram[i].gpa + (skip << PAGE_SHIFT)};
		taken += ram[i].pages - skip;
		skip = 0;
	}
}

static inline u64 page_gpa(const struct worker *w, u64 index)
{
	const struct part *p = &w->part[w->parts - 1];
	while (index < p->first)
		p--;
	return p->gpa + ((index - p->first) << PAGE_SHIFT);
}

static inline u64 version_of(const struct worker *w, u64 index)
{
	if (index >= w->dirty)
		return FIRST_VERSION(pass);
	return pass + (index < cursor);
}

/* Starts, continues or ends rewriting as in the settings, after the fill. */
static void set_pace(struct worker *w)
{
	bool write = settings.writing && w->dirty && !w->filling;
	u64 active = settings.dirty < machine.cpus ? settings.dirty : machine.cpus;
	u64 now = tsc();
	w->interval = settings.rate ? mul_div(tsc_hz, active, settings.rate) + 1 : 0;
	w->due = now + (active ? w->interval / active * w->id : 0);
	if (write && !w->writing)
		w->last = now;
	w->writing = write;
}

void worker_adopt(struct worker *w)
{
	u32 generation = __atomic_load_n(&settings.generation, __ATOMIC_ACQUIRE);
	if (settings.fill != w->fill) {
		take_part(w);
		pass = FIRST_OF_FILL(settings.fill);
		cursor = 0;
		w->filling = w->pages > 0;
		w->walking = false;
		w->fill = settings.fill;
		if (!w->filling)
			w->filled = settings.fill;
	}
	w->dirty = share(settings.dirty, w->id);
	w->zeros = settings.zeros;
	if (w->walk_every != settings.walk_every) {
		w->walk_every = settings.walk_every;
		w->walk_due = tsc();
	}
	set_pace(w);
	__atomic_store_n(&w->generation, generation, __ATOMIC_RELEASE);
}

static void fill_batch(struct worker *w)
{
	for (u32 i = 0; i < FILL_BATCH && cursor < w->pages; i++) {
		u64 gpa = page_gpa(w, cursor);
		page_write((void *)gpa, gpa >> PAGE_SHIFT, pass, w->zeros);
		cursor++;
	}
	if (cursor < w->pages)
		return;
	cursor = 0;
	w->filling = false;
	w->walk_due = tsc();
	w->filled = w->fill;
	set_pace(w);
}

__attribute__((noinline)) void worker_found_bad(struct worker *w, u64 gpa, u64 version, u64 zeros)
{
	w->bad++;
	u32 tail = w->report_tail;
	if (tail - w->report_head == REPORTS)
		return;
	page_examine((const void *)gpa, gpa >> PAGE_SHIFT, version, zeros, &w->report[tail % REPORTS]);
	__atomic_store_n(&w->report_tail, tail + 1, __ATOMIC_RELEASE);
}

/* Checks the page before it rewrites it: a stale page in a small range would otherwise exist for milliseconds only. */
static inline void rewrite_one(struct worker *w)
{
	u64 gpa = page_gpa(w, cursor), number = gpa >> PAGE_SHIFT;
	if (__builtin_expect(!page_looks_good((const void *)gpa, number, pass, w->zeros), 0))
		worker_found_bad(w, gpa, pass, w->zeros);
	page_write((void *)gpa, number, pass + 1, w->zeros);
	if (++cursor == w->dirty) {
		cursor = 0;
		pass++;
	}
	w->writes++;
	u64 now = tsc(), gap = now - w->last;
	if ((s64)gap > 0 && gap > w->gap)
		w->gap = gap;
	w->last = now;
}

static bool rewrite_batch(struct worker *w, u64 *next)
{
	if (!w->interval) {
		for (u32 i = 0; i < BATCH; i++)
			rewrite_one(w);
		return true;
	}
	u64 now = tsc();
	is_due(now, &w->due, w->interval + tsc_hz);
	if ((s64)(now - w->due) > (s64)clock_ms(100))
		w->due = now; /* after a pause, do not make up for missed writes */
	u32 written = 0;
	for (; written < BATCH && (s64)(now - w->due) >= 0; written++) {
		rewrite_one(w);
		w->due += w->interval;
		now = tsc();
	}
	if (written == BATCH)
		return true;
	u64 wake = now + clock_ms(1); /* shorter sleeps cost more than they help */
	sooner(next, (s64)(w->due - wake) > 0 ? w->due : wake);
	return false;
}

static bool walk_batch(struct worker *w, u64 *next)
{
	u64 now = tsc();
	if (!w->walking && is_due(now, &w->walk_due, w->walk_every)) {
		w->walking = true;
		w->walk_at = 0;
		w->walk_due = now + w->walk_every;
	}
	if (!w->walking) {
		sooner(next, w->walk_due);
		return false;
	}
	u32 done = 0;
	for (; done < BATCH && w->walk_at < w->pages; done++, w->walk_at++) {
		u64 gpa = page_gpa(w, w->walk_at), version = version_of(w, w->walk_at);
		if (__builtin_expect(!page_good((const void *)gpa, gpa >> PAGE_SHIFT, version, w->zeros), 0))
			worker_found_bad(w, gpa, version, w->zeros);
	}
	w->verified += done;
	w->walking = w->walk_at < w->pages;
	return true;
}

bool worker_step(struct worker *w, u64 *next)
{
	if (w->filling) {
		fill_batch(w);
		return true;
	}
	bool busy = pool_assist(w->id);
	if (w->writing)
		busy |= rewrite_batch(w, next);
	if (w->walk_every && w->pages)
		busy |= walk_batch(w, next);
	if (busy && w->timer != clock_ms(IDLE_MS)) { /* a fast timer is not needed now */
		w->timer = clock_ms(IDLE_MS);
		timer_set(w->timer);
	}
	return busy;
}

void worker_sleep(struct worker *w, u64 until)
{
	u64 idle = clock_ms(IDLE_MS);
	s64 wait = until - tsc();
	if (wait <= 0)
		return;
	if ((u64)wait > idle)
		wait = idle;
	if ((u64)wait != w->timer || (u64)wait != idle) {
		w->timer = wait;
		timer_set(wait);
	}
	service(SERVICE_SLEEP, 0);
}
