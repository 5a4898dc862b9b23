/* A line of text. Text that does not fit is dropped. */
#ifndef PRINT_H
#define PRINT_H

#include "guest.h"

struct line {
	u32 length;
	char text[508];
};

void put_char(struct line *l, char c);
void put(struct line *l, const char *text);
void put_number(struct line *l, u64 n);
void put_hex(struct line *l, u64 n);
void put_decimals(struct line *l, u64 n, u32 decimals); /* n is in units of 10^-decimals */
void put_size(struct line *l, u64 bytes);

#endif
