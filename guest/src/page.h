/* The content of an owned page: 512 words, each a function of the page's number (gpa / 4096) and version. */
#ifndef PAGE_H
#define PAGE_H

#include "guest.h"

/* The result of examining a bad page. */
struct finding {
	u64 number, version; /* expected */
	u64 word, expected, found;
	enum { FOUND_OLDER, FOUND_NEWER, FOUND_OTHER_PAGE, FOUND_ZEROS, FOUND_MIXED } kind;
	u64 found_number, found_version; /* of the page found; for FOUND_MIXED words 0 and 1 */
};

/* zeros: a page whose number is a multiple of it is all zeros at odd versions; 0: none. */
void page_write(void *page, u64 number, u64 version, u64 zeros);
bool page_good(const void *page, u64 number, u64 version, u64 zeros);
bool page_looks_good(const void *page, u64 number, u64 version, u64 zeros); /* checks nine words only */
void page_examine(const void *page, u64 number, u64 version, u64 zeros, struct finding *f);

/* finding.c: " expected version 1.7, found ..." */
struct line;
void put_finding(struct line *l, const struct finding *f);

#endif
