/* diskread: reads its own file for ever, page by page, and checks each word. The
 * file has a pattern that test/kernel puts there (pattern.bin). A page that is not in
 * memory comes by a page fault, without a system call. In a guest with less memory than
 * the file has, each pass reads the disk again. Word: idle=, as in memhog. */
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
