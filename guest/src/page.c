/* Writing and checking pages: the only hot code of the guest, so SSE2. */
#include <emmintrin.h>

#include "page.h"

#define WORDS 512
#define MARK 0x67760000UL /* "gv", the upper half of word 0, so that page 0 does not begin with 0 */

/* Word 0 has the page's number, word 1 its version; word i >= 2 is seed + i * STEP. */
#define STEP 0x9e3779b97f4a7c15UL

static inline u64 first_word(u64 number)
{
	return MARK << 32 | number;
}

static inline u64 seed_of(u64 number, u64 version)
{
	u64 x = number * 0xbf58476d1ce4e5b9UL + version * 0x94d049bb133111ebUL;
	x ^= x >> 29;
	x *= 0xd6e8feb86659fd93UL;
	return x ^ x >> 32;
}

static inline bool all_zero(u64 number, u64 version, u64 zeros)
{
	return __builtin_expect(zeros != 0, 0) && (version & 1) && number % zeros == 0;
}

static inline u64 word_of(u64 number, u64 version, u64 word)
{
	if (word == 0)
		return first_word(number);
	if (word == 1)
		return version;
	return seed_of(number, version) + word * STEP;
}

void page_write(void *page, u64 number, u64 version, u64 zeros)
{
	__m128i *to = page, *end = to + WORDS / 2;
	if (all_zero(number, version, zeros)) {
		for (; to < end; to++)
			_mm_store_si128(to, _mm_setzero_si128());
		return;
	}
	u64 seed = seed_of(number, version);
	__m128i a = _mm_set_epi64x(seed + 1 * STEP, seed), b = _mm_set_epi64x(seed + 3 * STEP, seed + 2 * STEP);
	__m128i c = _mm_set_epi64x(seed + 5 * STEP, seed + 4 * STEP), d = _mm_set_epi64x(seed + 7 * STEP, seed + 6 * STEP);
	const __m128i eight = _mm_set1_epi64x(8 * STEP);
	__m128i head = _mm_set_epi64x(version, first_word(number));
	for (; to < end; to += 4) {
		_mm_store_si128(to, head);
		_mm_store_si128(to + 1, b);
		_mm_store_si128(to + 2, c);
		_mm_store_si128(to + 3, d);
		head = a = _mm_add_epi64(a, eight);
		b = _mm_add_epi64(b, eight);
		c = _mm_add_epi64(c, eight);
		d = _mm_add_epi64(d, eight);
	}
}

bool page_good(const void *page, u64 number, u64 version, u64 zeros)
{
	const __m128i *at = page, *end = at + WORDS / 2;
	__m128i wrong = _mm_setzero_si128();
	if (all_zero(number, version, zeros)) {
		for (; at < end; at++)
			wrong = _mm_or_si128(wrong, _mm_load_si128(at));
	} else {
		u64 seed = seed_of(number, version);
		__m128i a = _mm_set_epi64x(seed + 1 * STEP, seed), b = _mm_set_epi64x(seed + 3 * STEP, seed + 2 * STEP);
		const __m128i four = _mm_set1_epi64x(4 * STEP);
		__m128i head = _mm_set_epi64x(version, first_word(number));
		__m128i wrong_b = wrong;
		for (; at < end; at += 2) {
			wrong = _mm_or_si128(wrong, _mm_xor_si128(head, _mm_load_si128(at)));
			wrong_b = _mm_or_si128(wrong_b, _mm_xor_si128(b, _mm_load_si128(at + 1)));
			head = a = _mm_add_epi64(a, four);
			b = _mm_add_epi64(b, four);
		}
		wrong = _mm_or_si128(wrong, wrong_b);
	}
	return _mm_movemask_epi8(_mm_cmpeq_epi8(wrong, _mm_setzero_si128())) == 0xffff;
}

/* Checks number, version and seven more words: fast enough for every rewrite. */
bool page_looks_good(const void *page, u64 number, u64 version, u64 zeros)
{
	const u64 *words = page;
	u64 wrong = 0;
	if (all_zero(number, version, zeros)) {
		for (u32 i = 0; i < WORDS; i += 73)
			wrong |= words[i];
		return !wrong;
	}
	u64 seed = seed_of(number, version);
	wrong = (words[0] ^ first_word(number)) | (words[1] ^ version);
	for (u64 i = 73; i < WORDS; i += 73)
		wrong |= words[i] ^ (seed + i * STEP);
	return !wrong;
}

/* For a page that page_good or page_looks_good has found bad. */
void page_examine(const void *page, u64 number, u64 version, u64 zeros, struct finding *f)
{
	const volatile u64 *words = page;
	f->number = number;
	f->version = version;
	bool zero = all_zero(number, version, zeros);
	f->word = WORDS;
	bool any = false;
	for (u64 i = 0; i < WORDS; i++) {
		u64 found = words[i], expected = zero ? 0 : word_of(number, version, i);
		any |= found != 0;
		if (found != expected && f->word == WORDS) {
			f->word = i;
			f->expected = expected;
			f->found = found;
		}
	}
	f->found_number = words[0] & 0xffffffffUL;
	f->found_version = words[1];
	if (!any)
		f->kind = FOUND_ZEROS;
	else if (words[0] >> 32 != MARK || !page_good(page, f->found_number, f->found_version, 0))
		f->kind = FOUND_MIXED;
	else if (f->found_number != number)
		f->kind = FOUND_OTHER_PAGE;
	else
		f->kind = f->found_version < version ? FOUND_OLDER : FOUND_NEWER;
}
