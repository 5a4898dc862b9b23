/* The C entry of every CPU, and CPU 0's other tasks: console, ticks, reports of bad pages. */
#include "devices.h"
#include "pool.h"
#include "power.h"
#include "serial.h"
#include "words.h"
#include "work.h"

#define POLL_MS 1000   /* the console is polled at this interval too */
#define UNKNOWN_MS 250 /* or at this one, where no table says that it has an interrupt */
#define BAD_LINES 10   /* for each tick */

static struct line l;
static u64 booted, poll_due, pump_due, tick_due, tick_period, limit_due;
static u64 ticks, bad_counted, bad_printed;
static u64 fill_started;
static u32 fill_announced, fill_seen;
static volatile bool cpus_may_go;

static void print_bad(const struct finding *f)
{
	put(&l, "bad page gpa=");
	put_hex(&l, f->number << PAGE_SHIFT);
	put(&l, " number=");
	put_number(&l, f->number);
	put_finding(&l, f);
	serial_line(&l);
}

/* Prints the first bad pages of each tick; limit_reports counts the others. */
static void print_reports(void)
{
	for (u32 cpu = 0; cpu < machine.cpus; cpu++) {
		struct worker *w = &workers[cpu];
		while (w->report_head != __atomic_load_n(&w->report_tail, __ATOMIC_ACQUIRE)) {
			if (bad_printed < BAD_LINES) {
				print_bad(&w->report[w->report_head % REPORTS]);
				bad_printed++;
			}
			__atomic_store_n(&w->report_head, w->report_head + 1, __ATOMIC_RELEASE);
		}
	}
}

static void limit_reports(u64 bad)
{
	static u32 mismatches;
	if (pool_mismatches != mismatches) {
		mismatches = pool_mismatches;
		bad_printed++;
		put(&l, "bad notes: the pool's notes do not match the vCPU's register");
		serial_line(&l);
	}
	if (bad - bad_counted > bad_printed) {
		put(&l, "and ");
		put_number(&l, bad - bad_counted - bad_printed);
		put(&l, " more bad pages");
		serial_line(&l);
	}
	bad_counted = bad;
	bad_printed = 0;
}

static u64 count_bad(void)
{
	u64 bad = pool_mismatches;
	for (u32 cpu = 0; cpu < machine.cpus; cpu++)
		bad += workers[cpu].bad;
	return bad;
}

static void print_tick(u64 now)
{
	u64 writes = 0, verified = 0, bad = count_bad(), gap = 0;
	for (u32 cpu = 0; cpu < machine.cpus; cpu++) {
		struct worker *w = &workers[cpu];
		writes += w->writes;
		verified += w->verified;
		u64 longest = __atomic_exchange_n(&w->gap, 0, __ATOMIC_RELAXED);
		s64 current = tsc() - w->last;
		if (w->writing && current > (s64)longest)
			longest = current;
		if (longest > gap)
			gap = longest;
	}
	limit_reports(bad);
	put(&l, "tick ");
	put_number(&l, ++ticks);
	put(&l, " up=");
	put_decimals(&l, mul_div(now - booted, 10, tsc_hz), 1);
	put(&l, " writes=");
	put_number(&l, writes);
	put(&l, " verified=");
	put_number(&l, verified);
	put(&l, " bad=");
	put_number(&l, bad);
	put(&l, " gap=");
	put_decimals(&l, mul_div(gap, 1000000, tsc_hz), 3);
	devices_count(&l);
	serial_line(&l);
}

/* After a pause longer than a tick the next tick is one period from now; missed ticks are not printed. */
static void tick(u64 now, u64 *next)
{
	if (tick_every != tick_period) {
		tick_period = tick_every;
		tick_due = now + tick_period;
	}
	if (!tick_period) {
		if (is_due(now, &limit_due, tsc_hz)) {
			limit_reports(count_bad());
			limit_due = now + tsc_hz;
		}
		return;
	}
	if (is_due(now, &tick_due, tick_period)) {
		print_tick(now);
		tick_due += tick_period;
		if ((s64)(now - tick_due) >= 0)
			tick_due = now + tick_period;
	}
	sooner(next, tick_due);
}

static void announce_fill(u64 now)
{
	if (settings.fill != fill_seen) {
		fill_seen = settings.fill;
		fill_started = now;
	}
	if (fill_announced == settings.fill)
		return;
	for (u32 cpu = 0; cpu < machine.cpus; cpu++)
		if (workers[cpu].filled != settings.fill)
			return;
	fill_announced = settings.fill;
	put(&l, "filled ");
	put_number(&l, settings.owned);
	put(&l, " pages in ");
	put_decimals(&l, mul_div(tsc() - fill_started, 1000, tsc_hz), 3);
	put(&l, " s");
	serial_line(&l);
}

static void chores(u64 *next)
{
	u64 now = tsc(), poll = clock_ms(machine.table_found ? POLL_MS : UNKNOWN_MS);
	if (serial_interrupted || is_due(now, &poll_due, poll)) {
		serial_interrupted = 0;
		poll_due = now + poll;
		int c;
		for (int i = 0; i < 64 && (c = serial_read()) >= 0; i++)
			words_typed(c);
		if (c >= 0)
			serial_interrupted = 1;
	}
	announce_fill(now);
	print_reports();
	devices_step(now, next);
	tick(now, next);
	if (is_due(now, &pump_due, tsc_hz)) {
		enum pump state = serial_pump();
		pump_due = state == PUMP_BLOCKED ? now + clock_ms(1) / 4 : now;
		if (state == PUMP_MORE)
			*next = now;
	}
	if ((s64)(pump_due - now) > 0)
		sooner(next, now + clock_ms(1));
	sooner(next, poll_due);
}

static void say_hello(void)
{
	put(&l, "govmm demo guest: ");
	put_number(&l, machine.cpus);
	put(&l, machine.cpus == 1 ? " vCPU, " : " vCPUs, ");
	put_number(&l, (memory_size + MIB / 2) / MIB);
	put(&l, " MiB; type help");
	serial_line(&l);
	if (!machine.table_found) {
		put(&l, "no MP table: using one vCPU");
		serial_line(&l);
	} else if (machine.cpus != machine.cpus_listed) {
		put(&l, "the MP table lists ");
		put_number(&l, machine.cpus_listed);
		put(&l, " vCPUs; at most 8 are used");
		serial_line(&l);
	}
	if (!ram_pages) {
		put(&l, "no memory map from the VMM: no memory can be owned");
		serial_line(&l);
	}
}

static void boot(u64 start_info)
{
	memory_init(start_info);
	machine_init();
	serial_init();
	lapic_init();
	ioapic_init();
	cpus_start();
	say_hello();
	serial_flush();
	clock_calibrate();
	booted = tsc();
	if (clock_guessed) {
		put(&l, "neither KVM's clock nor an 8254: time is estimated");
		serial_line(&l);
	}
	devices_init();
	cpus_may_go = true;
	for (u32 cpu = 1; cpu < machine.cpus; cpu++)
		cpu_wake(cpu);
	words_run(command_line);
}

/* The main function of every CPU, in ring 3. It never returns. */
void cpu_main(u64 cpu, u64 start_info)
{
	struct worker *w = &workers[cpu];
	w->id = cpu;
	if (cpu == 0) {
		boot(start_info);
	} else {
		lapic_init();
		cpus_running++;
		while (!cpus_may_go || cpu >= machine.cpus)
			service(SERVICE_SLEEP, 0);
	}
	for (;;) {
		u64 next = tsc() + tsc_hz;
		if (settings.generation != w->generation)
			worker_adopt(w);
		if (cpu == 0)
			chores(&next);
		if (!worker_step(w, &next))
			worker_sleep(w, next);
	}
}

/* Called by trap.S, in ring 3 with interrupts off; frame: vector, error code, RIP, CS, RFLAGS, RSP, SS. */
__attribute__((noreturn)) void trap_report(const u64 *frame, u64 cr2)
{
	static struct line report;
	serial_flush(); /* the lines before the trap */
	put(&report, "\r\ntrap: vector ");
	put_number(&report, frame[0]);
	put(&report, " error ");
	put_hex(&report, frame[1]);
	put(&report, " rip ");
	put_hex(&report, frame[2]);
	put(&report, " cs ");
	put_hex(&report, frame[3]);
	put(&report, " rsp ");
	put_hex(&report, frame[5]);
	put(&report, " cr2 ");
	put_hex(&report, cr2);
	put(&report, "; triple fault\r\n");
	serial_urgent(&report);
	for (;;)
		service(SERVICE_TRIPLE_FAULT, 0);
}
