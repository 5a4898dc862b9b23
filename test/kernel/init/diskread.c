/* diskread: reads its own file for ever, page by page, and checks every word.
 * The file holds a pattern that test/kernel puts there (pattern.bin). Started
 * from a disk in a guest with less memory than the file is long, the pages
 * come from the disk again on every pass, without a system call: a read of a
 * page that is not in memory is a page fault. Word: idle=, as in memhog. */
#include "report.h"

__asm__(".section .pattern, \"a\", @progbits\n"
	".balign 4096\n"
	".globl pattern_begin, pattern_end\n"
	"pattern_begin: .incbin \"pattern.bin\"\n"
	"pattern_end:\n"
	".text\n");

extern const u64 pattern_begin[], pattern_end[];

static void run(char **argv, char **env)
{
	u64 idle = word_of(argv, "idle", word_of(env, "idle", 0));
	u64 pages = (u64)(pattern_end - pattern_begin) / WORDS;

	publish(pages);
	for (u64 pass = 1;; pass++) {
		for (u64 page = 0; page < pages; page++) {
			check(pattern_begin + page * WORDS, page, 0);
			for (u64 i = 0; i < idle; i++)
				__asm__ volatile("pause");
		}
		REPORT->passes = pass;
	}
}

ENTRY(run);
