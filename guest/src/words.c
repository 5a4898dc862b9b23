/* Parses words, refuses what is not possible, and changes the settings. */
#include "words.h"
#include "pool.h"
#include "power.h"
#include "serial.h"
#include "work.h"

u64 tick_every;

static const char *const help[] = {
	"fill=SIZE       own this much memory (K, M, G) and fill every page of it",
	"dirty=SIZE      rewrite this much of it, page by page, repeatedly",
	"rate=PAGES/S    at this rate; 0: as fast as possible",
	"verify=SECONDS  check every owned page once in this time; 0: never",
	"zeros=N         every Nth owned page is all zeros at odd versions; 0: none",
	"tick=SECONDS    print a line at this interval; 0: never",
	"stop            stop rewriting; dirty= or rate= resumes it",
	"pool=SIZE       own this much more, fill it once and free it, for balloon, reports and hints",
	"keep=SIZE       this much of the pool stays full and is checked",
	"churn=PAGES/S   take pages of the pool and free others, at this rate",
	"hintrace[=N]    take back and rewrite one of N (2) hinted blocks immediately; 0: none",
	"hints=0|1, reports=0|1  answer requests for hints; report free blocks (both 1)",
	"disk=SIZE       write, flush, read back and check this much of the disk, repeatedly; 0: nothing",
	"drate=PAGES/S   at this rate (4000); 0: as fast as possible",
	"ip=ADDRESS      answer ARP, ping and UDP port 7 for this address",
	"poweroff, reboot, crash (an unhandled trap), help",
};

/* The effect of the words of one line. */
struct wish {
	struct settings settings;
	u64 fill_pages;
	bool fill, changed;
	enum { GO_ON, POWER_OFF, REBOOT, CRASH } then;
};

const char bad_size[] = "expected a size, such as 400M";
const char bad_number[] = "expected a number between 0 and 1000000000";

static struct line l;

bool refuse(const char *word, u32 length, const char *why)
{
	for (u32 i = 0; i < length && i < 60; i++)
		put_char(&l, word[i] >= ' ' && word[i] <= '~' ? word[i] : '?');
	put(&l, ": ");
	put(&l, why);
	serial_line(&l);
	return false;
}

/* Parses leading digits; false: none, or a number of 2^63 or more. */
static bool read_number(const char *text, u32 length, u64 *n, u32 *used)
{
	*n = *used = 0;
	for (; *used < length && text[*used] >= '0' && text[*used] <= '9'; ++*used) {
		u64 digit = text[*used] - '0';
		if (*n > (0x7fffffffffffffffUL - digit) / 10)
			return false;
		*n = *n * 10 + digit;
	}
	return *used > 0;
}

/* Parses bytes, or a number with K, M, G or T, powers of 1024. Returns pages, rounded up. */
bool read_size(const char *text, u32 length, u64 *pages)
{
	u64 n, shift = 0;
	u32 used;
	if (!read_number(text, length, &n, &used) || length - used > 1)
		return false;
	if (used < length) {
		switch (text[used] & ~0x20) {
		case 'T': shift += 10; /* fall through */
		case 'G': shift += 10; /* fall through */
		case 'M': shift += 10; /* fall through */
		case 'K': shift += 10; break;
		default: return false;
		}
	}
	if (n > (0x7fffffffffffffffUL >> shift) - PAGE)
		return false;
	*pages = ((n << shift) + PAGE - 1) >> PAGE_SHIFT;
	return true;
}

/* Parses seconds (0, 5, 0.25) to the millisecond. Returns TSC cycles. */
static bool read_seconds(const char *text, u32 length, u64 *cycles)
{
	u64 whole, fraction = 0;
	u32 used;
	if (!read_number(text, length, &whole, &used) || whole > 1000000)
		return false;
	if (used < length) {
		if (text[used++] != '.' || used == length)
			return false;
		for (u64 unit = 100; used < length; used++, unit /= 10) {
			if (text[used] < '0' || text[used] > '9')
				return false;
			fraction += (text[used] - '0') * unit;
		}
	}
	*cycles = clock_ms(whole * 1000 + fraction);
	return true;
}

bool read_plain(const char *text, u32 length, u64 *n)
{
	u64 number;
	u32 used;
	if (!read_number(text, length, &number, &used) || used < length || number > 1000000000)
		return false;
	*n = number;
	return true;
}

/* The value of word if it is `name=value`. */
const char *value_of(const char *word, u32 length, const char *name, u32 *value_length)
{
	u32 i = 0;
	while (name[i] && i < length && word[i] == name[i])
		i++;
	if (name[i] || i == length || word[i] != '=')
		return 0;
	*value_length = length - i - 1;
	return word + i + 1;
}

bool is_word(const char *word, u32 length, const char *name)
{
	u32 i = 0;
	while (i < length && name[i] && word[i] == name[i])
		i++;
	return i == length && !name[i];
}

static bool one_word(const char *word, u32 length, struct wish *w)
{
	static const char bad_seconds[] = "expected seconds, such as 5 or 0.5";
	const char *v;
	u32 n;
	bool known;
	if (device_word(word, length, &known) || known)
		return false;
	if ((v = value_of(word, length, "fill", &n))) {
		if (!read_size(v, n, &w->fill_pages))
			return refuse(word, length, bad_size);
		w->fill = true;
	} else if ((v = value_of(word, length, "dirty", &n))) {
		if (!read_size(v, n, &w->settings.dirty))
			return refuse(word, length, bad_size);
		w->settings.writing = w->settings.dirty > 0;
	} else if ((v = value_of(word, length, "rate", &n))) {
		if (!read_plain(v, n, &w->settings.rate))
			return refuse(word, length, bad_number);
		w->settings.writing = w->settings.dirty > 0;
	} else if ((v = value_of(word, length, "verify", &n))) {
		if (!read_seconds(v, n, &w->settings.walk_every))
			return refuse(word, length, bad_seconds);
	} else if ((v = value_of(word, length, "zeros", &n))) {
		if (!read_plain(v, n, &w->settings.zeros))
			return refuse(word, length, bad_number);
	} else if ((v = value_of(word, length, "tick", &n))) {
		if (!read_seconds(v, n, &tick_every))
			return refuse(word, length, bad_seconds);
	} else if (is_word(word, length, "stop")) {
		w->settings.writing = false;
	} else if (is_word(word, length, "help")) {
		for (u32 i = 0; i < sizeof help / sizeof *help; i++) {
			put(&l, help[i]);
			serial_line(&l);
		}
		return false;
	} else if (is_word(word, length, "poweroff")) {
		w->then = POWER_OFF;
		return false;
	} else if (is_word(word, length, "reboot")) {
		w->then = REBOOT;
		return false;
	} else if (is_word(word, length, "crash")) {
		w->then = CRASH;
		return false;
	} else {
		return refuse(word, length, "unknown word; type help");
	}
	return true;
}

/* "owns 400M, rewrites 64M flat out, verifies every 5.000 s, ticks every 1.000 s" */
static void print_settings(void)
{
	put(&l, "owns ");
	put_size(&l, settings.owned * PAGE);
	put(&l, settings.writing ? ", rewrites " : ", rewrites nothing");
	if (settings.writing) {
		put_size(&l, settings.dirty * PAGE);
		put(&l, settings.rate ? " at " : " flat out");
		if (settings.rate) {
			put_number(&l, settings.rate);
			put(&l, " pages/s");
		}
	}
	u64 every[] = {settings.walk_every, tick_every};
	for (u32 i = 0; i < 2; i++) {
		put(&l, i ? ", ticks " : ", verifies ");
		if (every[i]) {
			put(&l, "every ");
			put_decimals(&l, mul_div(every[i] + tsc_hz / 2000, 1000, tsc_hz), 3);
			put(&l, " s");
		} else {
			put(&l, "never");
		}
	}
	serial_line(&l);
}

static void refuse_size(const char *word, u64 wanted, u64 there, const char *what)
{
	put(&l, word);
	put_size(&l, wanted * PAGE);
	put(&l, ": refused, ");
	put(&l, what);
	put_size(&l, there * PAGE);
	serial_line(&l);
}

/*
 * Pages must be filled again when other pages are owned, when their content changes (zeros), and when the range to
 * rewrite changes after writes: the guest does not store a version for each page.
 */
static void commit(struct wish *w)
{
	static bool rewritten; /* since the last fill */
	struct settings *next = &w->settings;
	if (w->fill && w->fill_pages > ram_pages - pool_pages) {
		refuse_size("fill=", w->fill_pages, ram_pages - pool_pages, "this machine can own ");
		w->fill = false;
	}
	if (w->fill) {
		next->owned = w->fill_pages;
		if (settings.owned > 0 && next->dirty == settings.dirty && next->dirty > next->owned) {
			next->dirty = 0; /* the new fill is smaller than the old range */
			next->writing = false;
		}
	}
	if (next->dirty > next->owned) {
		refuse_size("dirty=", next->dirty, next->owned, "fill= owns ");
		next->dirty = settings.dirty;
		next->writing = settings.writing;
		if (next->dirty > next->owned) {
			next->dirty = 0;
			next->writing = false;
		}
	}
	if (w->fill || (next->owned && next->zeros != settings.zeros) || (rewritten && next->dirty != settings.dirty)) {
		next->fill++;
		rewritten = false;
	}
	rewritten |= next->writing;
	settings_publish(next);
	print_settings();
}

void words_run(const char *text)
{
	struct wish w = {.settings = settings};
	for (;;) {
		while (*text == ' ' || *text == '\t')
			text++;
		u32 length = 0;
		while (text[length] && text[length] != ' ' && text[length] != '\t')
			length++;
		if (!length)
			break;
		w.changed |= one_word(text, length, &w);
		text += length;
	}
	if (w.changed)
		commit(&w);
	switch (w.then) {
	case GO_ON: break;
	case POWER_OFF: power_off();
	case REBOOT: reboot();
	case CRASH: __asm__ volatile("ud2");
	}
}

/* Handles a character from the console: echo, backspace, Ctrl-U and Ctrl-C. */
void words_typed(char c)
{
	static char typed[256];
	static u32 length;
	static bool after_cr;
	bool line_feed_of_crlf = c == '\n' && after_cr;
	after_cr = c == '\r';
	if (line_feed_of_crlf)
		return;
	if (c == '\r' || c == '\n') {
		serial_echo('\r');
		serial_echo('\n');
		typed[length] = 0;
		length = 0;
		serial_edit(typed, 0);
		words_run(typed);
		return;
	}
	if (c == '\b' || c == 0x7f || c == 0x15 || c == 0x03) {
		u32 erase = c == '\b' || c == 0x7f ? length > 0 : length;
		for (length -= erase; erase; erase--) {
			serial_echo('\b');
			serial_echo(' ');
			serial_echo('\b');
		}
	} else if (c >= ' ' && c <= '~' && length < sizeof typed - 1) {
		typed[length++] = c;
		serial_echo(c);
	}
	serial_edit(typed, length);
}
