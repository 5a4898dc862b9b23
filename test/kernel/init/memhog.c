/* memhog: rewrites memory for ever. Before it rewrites a page it checks that each
 * word is what it wrote last. Words: size= (bytes, default 32M,
 * at most 64M), idle= (pause instructions after each page, default 0). */
#include "report.h"

enum { MAX = 64 << 20 };

static u64 memory[MAX / 8] __attribute__((aligned(PAGE)));

static void run(char **argv, char **env)
{
	u64 size = word_of(argv, "size", word_of(env, "size", 32 << 20));
	u64 idle = word_of(argv, "idle", word_of(env, "idle", 0));
	u64 pages = (size > MAX ? MAX : size) / PAGE;

	publish(pages);
	for (u64 pass = 1;; pass++) {
		for (u64 page = 0; page < pages; page++) {
			volatile u64 *p = memory + page * WORDS;

			if (pass > 1)
				check(p, page, pass - 1);
			for (u64 w = 0; w < WORDS; w++)
				p[w] = pattern(page, pass, w);
			REPORT->written++;
			for (u64 i = 0; i < idle; i++)
				__asm__ volatile("pause");
		}
		REPORT->passes = pass;
	}
}

ENTRY(run);
