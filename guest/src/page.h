/* The content of an owned page: 512 words, every one a function of the page's number (gpa / 4096) and version. */
#ifndef PAGE_H
#define PAGE_H

#include "guest.h"

/* What is wrong with a page. */
struct finding {
	u64 number, version; /* expected */
	u64 word, expected, found;
	enum { FOUND_OLDER, FOUND_NEWER, FOUND_OTHER_PAGE, FOUND_ZEROS, FOUND_MIXED } kind;
	u64 found_number, found_version; /* of a page that is whole, but not the expected one; of FOUND_MIXED, word 0 and 1 */
};

/* zeros: every page whose number it divides is all zeros at odd versions; 0: none is. */
void page_write(void *page, u64 number, u64 version, u64 zeros);
bool page_good(const void *page, u64 number, u64 version, u64 zeros);
bool page_looks_good(const void *page, u64 number, u64 version, u64 zeros); /* checks nine words, spread over it */
void page_examine(const void *page, u64 number, u64 version, u64 zeros, struct finding *f);

/* finding.c: " expected version 1.7, found ..." */
struct line;
void put_finding(struct line *l, const struct finding *f);

#endif
