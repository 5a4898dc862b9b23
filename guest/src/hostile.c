/*
 * A guest for tests of the VMM. It writes anything to any register, hands its devices rings and requests that keep to no
 * rule, resets them at any time, and goes on after each trap. "seed=N" on the command line says what it does.
 */
#include "hostile.h"
#include "print.h"
#include "serial.h"

#define ECAM 0xe0000000UL
#define ECAM_SIZE MIB
#define LAPIC 0xfee00000UL
#define IOAPIC 0xfec00000UL
#define PM_CONTROL 0x604
#define SLEEP_ENABLE 0x20 /* in PM_CONTROL's upper byte */
#define RESET_CONTROL 0xcf9
#define KEYBOARD 0x64
#define SAY_STEPS 512
#define ARENA (4 * MIB)

struct target targets[TARGETS];
u32 target_count;
u64 arena, arena_end;
bool reckless;

extern u8 cpu_pages[], user_stacks[];
extern volatile u32 dying;

static bool may_reset, may_power_off;
static struct chance chances[MAX_CPUS];
static volatile u32 traps;
static volatile bool cpus_may_go;

u32 any_value(struct chance *c)
{
	static const u32 special[] = {0, 1, 2, 0x7fffffff, 0x80000000, 0xffff, 0xfffffffe, 0xffffffff};
	switch (below(c, 4)) {
	case 0:
		return special[below(c, sizeof special / sizeof *special)];
	case 1:
		return below(c, 256);
	default:
		return draw(c) >> below(c, 32) >> 16;
	}
}

/* Mostly the arena, often where rings are, sometimes the end of memory, registers, or nothing at all. */
u64 any_address(struct chance *c)
{
	switch (below(c, 64)) {
	case 0:
		return draw(c) >> below(c, 40);
	case 1:
		return arena_end - below(c, 2 * PAGE);
	case 2:
		return targets[below(c, target_count + 1) % TARGETS].bars[0] & -16U;
	case 3:
		if (reckless)
			return below(c, 2 * MIB);
		return -below(c, 2 * PAGE);
	}
	if (below(c, 4) == 0)
		return arena + below(c, RINGS);
	return arena + below(c, arena_end - arena);
}

/* Writes by ports, with any width that fits the offset. */
void config_write(struct chance *c, struct function f, u32 offset, u32 width, u32 value)
{
	u32 low = offset & 3;
	outl(0xcf8, f.address | (offset & 0xfc));
	if (width == 1)
		outb(0xcfc + low, value);
	else if (width == 2)
		outw(0xcfc + (low & 2), value);
	else
		outl(0xcfc, value);
	if (below(c, 8) == 0)
		inl(0xcfc + low);
}

u64 bar_address(struct target *t, u32 index)
{
	u64 address = pci_bar(t->function, index);
	return address >= arena_end || reckless ? address : 0;
}

static void any_config(struct chance *c)
{
	struct function f = {0x80000000 | below(c, 0x10000)};
	if (below(c, 8))
		f = targets[below(c, target_count)].function;
	if (below(c, 4) == 0) { /* by memory */
		u64 at = ECAM + (f.address & 0xff00) * 16 + below(c, below(c, 4) ? 256 : PAGE);
		if (map_device(ECAM) && at + 4 <= ECAM + ECAM_SIZE) {
			mmio_write32(at, any_value(c));
			mmio_read16(at & -2UL);
		}
		return;
	}
	config_write(c, f, below(c, below(c, 4) ? 64 : 256), 1 << below(c, 3), any_value(c));
}

/* The ports that exist, and their neighbours; sometimes any. */
static void any_port(struct chance *c)
{
	static const struct {
		u16 first, n;
	} known[] = {{0x3f8, 8}, {0x70, 2}, {0x600, 8}, {0x60, 5}, {0x505, 1}, {0xcf8, 8}, {0x40, 4}, {0x20, 2}, {0xa0, 2}, {0x4d0, 2}, {0x61, 1}, {0x80, 1}};
	u32 i = below(c, sizeof known / sizeof *known);
	u16 port = known[i].first + below(c, known[i].n), value = any_value(c);
	u32 width = below(c, 8) ? 1 : 1 << below(c, 3);
	if (below(c, 8) == 0)
		port = below(c, 0x1000);
	/* What ends the guest would end the run. */
	if (!may_power_off && port + width > PM_CONTROL && port <= PM_CONTROL + 1)
		value &= (u16)~(SLEEP_ENABLE << 8 | SLEEP_ENABLE);
	if (!may_reset && ((port + width > RESET_CONTROL && port <= RESET_CONTROL) || (port + width > KEYBOARD && port <= KEYBOARD)))
		value = 0;
	if (below(c, 3) == 0)
		inb(port);
	if (width == 1)
		outb(port, value);
	else if (width == 2)
		outw(port, value);
	else
		outl(port, value | (u32)value << 16);
}

/* The interrupt controllers are the kernel's, not the VMM's: only what travels with a migration is of interest. */
static void any_controller(struct chance *c)
{
	if (below(c, 2)) {
		mmio_write32(IOAPIC, below(c, 64));
		mmio_write32(IOAPIC + 16, any_value(c));
	} else if (reckless) {
		mmio_write32(LAPIC + 16 * below(c, 64), any_value(c));
	}
}

static void scribble(struct chance *c)
{
	u64 *at = (u64 *)(arena + (below(c, RINGS) & -8UL));
	for (u64 n = below(c, 64); n; n--)
		*at++ = draw(c) >> below(c, 64);
}

static void idle(struct chance *c)
{
	for (u64 n = below(c, 20000); n; n--)
		__asm__ volatile("pause");
}

static void step(struct chance *c)
{
	struct target *t = &targets[below(c, target_count)];
	u64 n = below(c, 100);
	if (n < 40)
		target_work(c, t);
	else if (n < 60)
		target_poke(c, t);
	else if (n < 68)
		target_start(c, t);
	else if (n < 74)
		target_requeue(c, t);
	else if (n < 80)
		any_config(c);
	else if (n < 86)
		any_port(c);
	else if (n < 88)
		any_controller(c);
	else if (n < 92)
		scribble(c);
	else if (n < 95)
		target_repair(t);
	else
		idle(c);
}

static void say(struct chance *c, u64 seed)
{
	static struct line l;
	serial_init();
	put(&l, "\r\nhostile guest: seed ");
	put_number(&l, seed);
	put(&l, ", ");
	put_number(&l, target_count);
	put(&l, " devices, step ");
	put_number(&l, c->steps);
	put(&l, ", ");
	put_number(&l, traps);
	put(&l, " traps\r\n");
	serial_urgent(&l);
	l.length = 0;
}

static u64 seed;

/* Goes on for ever; a trap may start it again, with the CPU's stack as it was in the beginning. */
__attribute__((noreturn)) static void run(u64 cpu)
{
	struct chance *c = &chances[cpu];
	for (;;) {
		if (cpu == 0 && c->steps % SAY_STEPS == 0)
			say(c, seed);
		c->steps++;
		step(c);
	}
}

static u64 word(const char *name)
{
	u64 value = 0;
	for (const char *at = command_line; *at; at++) {
		u32 n = 0;
		while (name[n] && at[n] == name[n])
			n++;
		if (name[n])
			continue;
		for (at += n; *at >= '0' && *at <= '9'; at++)
			value = 10 * value + (*at - '0');
		return value;
	}
	return 0;
}

static void boot(u64 start_info)
{
	memory_init(start_info);
	machine_init();
	serial_init();
	lapic_init();
	ioapic_init();
	cpus_start();
	seed = word("seed=");
	reckless = seed % 8 == 7;
	may_reset = seed % 8 == 5 || reckless;
	may_power_off = seed % 32 == 31;
	arena = ARENA;
	arena_end = ram[0].gpa + ram[0].pages * PAGE;
	target_find();
	for (u32 i = 0; i < MAX_CPUS; i++)
		chances[i].state = (seed + 1) * 0x9e3779b97f4a7c15UL + i * 0x632be59bd9b4e019UL + 1;
	cpus_may_go = target_count > 0;
	for (u32 cpu = 1; cpu < machine.cpus; cpu++)
		cpu_wake(cpu);
}

/* The main function of every CPU, in ring 3. */
void cpu_main(u64 cpu, u64 start_info)
{
	if (cpu == 0)
		boot(start_info);
	else
		cpus_running++;
	while (!cpus_may_go)
		service(SERVICE_SLEEP, 0);
	run(cpu);
}

/* Called by trap.S, in ring 3 with interrupts off. The CPU goes on, on its own stack. */
__attribute__((noreturn)) void trap_report(const u64 *frame, u64 cr2)
{
	(void)frame, (void)cr2;
	u64 cpu = (dying - (u64)cpu_pages) / CPU_PAGE;
	u64 stack = (u64)user_stacks + (cpu + 1) * USER_STACK - 8;
	traps++;
	__asm__ volatile("movq %0, %%rsp; movl $0, dying; jmp *%2" : : "r"(stack), "D"(cpu), "r"(run) : "memory");
	__builtin_unreachable();
}
