/* The description of a bad page. */
#include "page.h"
#include "print.h"

static void put_version(struct line *l, u64 version)
{
	put_number(l, version >> 40);
	put_char(l, '.');
	put_number(l, version & 0xffffffffffUL);
}

void put_finding(struct line *l, const struct finding *f)
{
	put(l, " expected version ");
	put_version(l, f->version);
	put(l, ", found ");
	switch (f->kind) {
	case FOUND_OLDER:
		put(l, "its older version ");
		put_version(l, f->found_version);
		break;
	case FOUND_NEWER:
		put(l, "its newer version ");
		put_version(l, f->found_version);
		break;
	case FOUND_OTHER_PAGE:
		put(l, "page ");
		put_number(l, f->found_number);
		put(l, " version ");
		put_version(l, f->found_version);
		break;
	case FOUND_ZEROS:
		put(l, "all zeros");
		break;
	case FOUND_MIXED:
		put(l, "a mixture");
		break;
	}
	put(l, "; word ");
	put_number(l, f->word);
	put(l, ": expected ");
	put_hex(l, f->expected);
	put(l, ", found ");
	put_hex(l, f->found);
}
