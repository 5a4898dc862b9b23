/* Shared by the test kernel's first processes: no system call, no library, and a page
 * of counters that the host finds in guest memory. */
#ifndef REPORT_H
#define REPORT_H

typedef unsigned long u64;

enum { PAGE = 4096, WORDS = PAGE / 8 };

/* The report page. test/kernel/report.go reads it. */
struct report {
	u64 magic[2];
	u64 version;
	u64 pages;     /* in the working set */
	u64 passes;    /* over the working set, completed */
	u64 written;   /* pages written, cumulative */
	u64 verified;  /* pages found as they should be, cumulative */
	u64 bad;       /* pages found otherwise, cumulative */
	u64 bad_page;  /* the first bad page, its word, */
	u64 bad_word;
	u64 bad_want;  /* and what was in it */
	u64 bad_found;
} __attribute__((aligned(PAGE)));

/* Alone on its page. The process writes the magic number, so neither the file nor the
 * page cache has it. */
static union {
	volatile struct report report;
	char page[PAGE];
} shared __attribute__((aligned(PAGE)));

#define REPORT (&shared.report)

/* Writes the magic number, which the code has inverted. */
static inline void publish(u64 pages)
{
	u64 a = ~0x474f486d6d766f67UL, b = ~0x312d74726f706572UL; /* "govmmHOG", "report-1" */

	__asm__("" : "+r"(a), "+r"(b));
	REPORT->version = 1;
	REPORT->pages = pages;
	REPORT->magic[1] = ~b;
	REPORT->magic[0] = ~a;
}

/* The word at an offset of a page after a pass: different for all pages and passes
 * (the finaliser of a 64-bit mixing function). */
static inline u64 pattern(u64 page, u64 pass, u64 word)
{
	u64 x = (page * WORDS + word + 1) * 0x9e3779b97f4a7c15UL + pass * 0xd1342543de82ef95UL;

	x ^= x >> 32;
	x *= 0xd6e8feb86659fd93UL;
	return x ^ x >> 32;
}

/* Compares a page with the pattern and counts what it finds. */
static inline void check(const volatile u64 *p, u64 page, u64 pass)
{
	for (u64 w = 0; w < WORDS; w++) {
		u64 want = pattern(page, pass, w), found = p[w];

		if (found == want)
			continue;
		if (REPORT->bad == 0) {
			REPORT->bad_page = page;
			REPORT->bad_word = w;
			REPORT->bad_want = want;
			REPORT->bad_found = found;
		}
		REPORT->bad++;
		return;
	}
	REPORT->verified++;
}

/* Reads "name=NUMBER[K|M|G]" from the words that the kernel passes: argv has those after
 * "--" on its command line, the environment those that the kernel does not know. */
static inline u64 word_of(char **words, const char *name, u64 otherwise)
{
	for (; *words; words++) {
		const char *s = *words, *n = name;
		u64 value = 0;

		while (*n && *s == *n)
			s++, n++;
		if (*n || *s != '=')
			continue;
		for (s++; *s >= '0' && *s <= '9'; s++)
			value = value * 10 + (u64)(*s - '0');
		return *s == 'G' ? value << 30 : *s == 'M' ? value << 20 : *s == 'K' ? value << 10 : value;
	}
	return otherwise;
}

/* The entry point: the stack holds argc, argv, 0, environment, 0. */
#define ENTRY(run)                                                             \
	__attribute__((used)) static void start(long *stack)                   \
	{                                                                      \
		char **argv = (char **)(stack + 1);                            \
		run(argv, argv + stack[0] + 1);                                \
	}                                                                      \
	__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n" \
		"\tand $-16, %rsp\n\tcall start\n\tud2\n")

#endif
