/* Formatting, and the functions that gcc requires even without a C library. */
#include "print.h"

void put_char(struct line *l, char c)
{
	if (l->length < sizeof l->text)
		l->text[l->length++] = c;
}

void put(struct line *l, const char *text)
{
	while (*text)
		put_char(l, *text++);
}

static void put_digits(struct line *l, u64 n, u32 base, u32 at_least)
{
	char digits[20];
	u32 count = 0;
	do
		digits[count++] = "0123456789abcdef"[n % base];
	while ((n /= base) || count < at_least);
	while (count)
		put_char(l, digits[--count]);
}

void put_number(struct line *l, u64 n)
{
	put_digits(l, n, 10, 1);
}

void put_hex(struct line *l, u64 n)
{
	put(l, "0x");
	put_digits(l, n, 16, 1);
}

void put_decimals(struct line *l, u64 n, u32 decimals)
{
	u64 unit = 1;
	for (u32 i = 0; i < decimals; i++)
		unit *= 10;
	put_number(l, n / unit);
	put_char(l, '.');
	put_digits(l, n % unit, 10, decimals);
}

/* Uses the largest unit that divides the number: 400M, 3G, 4100K. */
void put_size(struct line *l, u64 bytes)
{
	u32 unit = 0;
	while (bytes && bytes % KIB == 0 && unit < 3) {
		bytes /= KIB;
		unit++;
	}
	put_number(l, bytes);
	if (unit)
		put_char(l, " KMG"[unit]);
}

void *memcpy(void *to, const void *from, u64 n)
{
	void *start = to;
	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
	return start;
}

void *memset(void *to, int byte, u64 n)
{
	void *start = to;
	__asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(byte) : "memory");
	return start;
}
