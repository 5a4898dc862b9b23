/* diskwriter: writes, flushes, reads and checks small files on its root disk, truncates,
 * renames and removes them, until a line comes on its console. Then /sums has what each
 * file must have, and the file system is read-only.
 *
 * A system call is INT 0x80, as build.sh has it where ring 0 is emulated: all
 * pointers are below 4 GiB. */
#include "report.h"

enum { FILES = 8, BLOCKS = 64 };
enum { WRONLY = 1, CREAT = 0100, NONBLOCK = 04000, DIRECT = 040000 };
enum { READ = 3, WRITE = 4, OPEN = 5, CLOSE = 6, UNLINK = 10, MOUNT = 21, SYNC = 36, RENAME = 38, FCNTL = 55,
	FTRUNCATE = 93, FSYNC = 118, PREAD = 180, PWRITE = 181 };

/* What the files must have. The generation of a block is unique, and 0 if it is a hole. */
static struct {
	u64 blocks[FILES]; /* its length */
	u64 generation[FILES][BLOCKS];
} sums;

static u64 block[WORDS] __attribute__((aligned(PAGE)));
static char line[PAGE], root[] = "/", sums_name[] = "/sums", name[] = "/data/0", other[] = "/data/0";
static u64 clock;

/* Without glibc gcc calls this for what is large. */
void *memset(void *p, int c, unsigned long n)
{
	for (volatile char *b = p; n > 0; n--)
		*b++ = (char)c;
	return p;
}

static void say(const char *s)
{
	u64 n = 0;

	while (s[n]) {
		line[n] = s[n];
		n++;
	}
	int ignored = WRITE;
	__asm__ volatile("int $0x80" : "+a"(ignored) : "b"(1), "c"(line), "d"(n) : "memory", "r8", "r9", "r10", "r11");
}

static int try(int nr, u64 a, u64 b, u64 c, u64 d, u64 e)
{
	__asm__ volatile("int $0x80" : "+a"(nr) : "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory", "r8", "r9", "r10", "r11");
	return nr;
}

/* A call that must succeed. */
static int call(int nr, u64 a, u64 b, u64 c, u64 d, u64 e)
{
	int got = try(nr, a, b, c, d, e);

	if (got >= 0)
		return got;
	REPORT->bad_page = (u64)nr;
	REPORT->bad_found = (u64)-got;
	REPORT->bad++;
	say("diskwriter: a system call has failed\n");
	for (;;)
		__asm__ volatile("pause");
}

static u64 draw(u64 n)
{
	static u64 x = 88172645463325252UL;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return (x >> 8) % n;
}

static int open(u64 file, int flags)
{
	name[sizeof(name) - 2] = (char)('0' + file);
	return call(OPEN, (u64)name, (u64)(CREAT | flags), 0600, 0, 0);
}

static void write_some(u64 file)
{
	int fd = open(file, WRONLY);
	u64 at = draw(BLOCKS);

	for (u64 n = 1 + draw(4); n > 0 && at < BLOCKS; n--, at++) {
		clock++;
		for (u64 w = 0; w < WORDS; w++)
			block[w] = pattern(at, clock, w);
		if (call(PWRITE, (u64)fd, (u64)block, PAGE, at * PAGE, 0) != PAGE)
			say("diskwriter: a short write\n"), REPORT->bad++;
		sums.generation[file][at] = clock;
		if (sums.blocks[file] <= at)
			sums.blocks[file] = at + 1;
		REPORT->written++;
	}
	if (draw(2))
		call(FSYNC, (u64)fd, 0, 0, 0, 0);
	call(CLOSE, (u64)fd, 0, 0, 0, 0);
}

/* Half of what is read comes from the disk, and not from the page cache. */
static void read_some(u64 file)
{
	int fd = open(file, draw(2) ? DIRECT : 0);
	u64 at = draw(BLOCKS);

	for (u64 n = 1 + draw(8); n > 0 && at < BLOCKS; n--, at++) {
		int want = at < sums.blocks[file] ? PAGE : 0;
		u64 generation = sums.generation[file][at], sum = 0;

		if (call(PREAD, (u64)fd, (u64)block, PAGE, at * PAGE, 0) != want)
			say("diskwriter: a short read\n"), REPORT->bad++;
		if (want == 0)
			break;
		if (generation > 0) {
			check(block, at, generation);
			continue;
		}
		for (u64 w = 0; w < WORDS; w++)
			sum |= block[w];
		if (sum)
			say("diskwriter: a hole has data\n"), REPORT->bad++;
		else
			REPORT->verified++;
	}
	call(CLOSE, (u64)fd, 0, 0, 0, 0);
}

static void forget(u64 file, u64 from)
{
	for (u64 b = from; b < BLOCKS; b++)
		sums.generation[file][b] = 0;
	sums.blocks[file] = from;
}

static void truncate(u64 file)
{
	int fd = open(file, WRONLY);
	u64 to = draw(BLOCKS + 1);

	call(FTRUNCATE, (u64)fd, to * PAGE, 0, 0, 0);
	call(CLOSE, (u64)fd, 0, 0, 0, 0);
	if (to < sums.blocks[file])
		forget(file, to);
	sums.blocks[file] = to;
}

/* A file takes the place of another one, which is gone. */
static void replace(u64 file)
{
	u64 by = draw(FILES);

	if (by == file)
		return;
	call(CLOSE, (u64)open(by, WRONLY), 0, 0, 0, 0);
	other[sizeof(other) - 2] = (char)('0' + file);
	call(RENAME, (u64)name, (u64)other, 0, 0, 0);
	for (u64 b = 0; b < BLOCKS; b++)
		sums.generation[file][b] = sums.generation[by][b];
	sums.blocks[file] = sums.blocks[by];
	forget(by, 0);
}

static void finish(void)
{
	const char *p = (const char *)&sums;
	int fd = call(OPEN, (u64)sums_name, CREAT | WRONLY, 0600, 0, 0);

	for (u64 at = 0; at < sizeof(sums);)
		at += (u64)call(WRITE, (u64)fd, (u64)(p + at), sizeof(sums) - at, 0, 0);
	call(CLOSE, (u64)fd, 0, 0, 0, 0);
	call(SYNC, 0, 0, 0, 0, 0);
	call(MOUNT, 0, (u64)root, 0, 0x21, 0); /* MS_REMOUNT | MS_RDONLY */
	say("diskwriter: done\n");
	for (;;)
		__asm__ volatile("pause");
}

static void run(char **argv, char **env)
{
	(void)argv, (void)env;
	publish(FILES * BLOCKS);
	call(FCNTL, 0, 4, NONBLOCK, 0, 0); /* F_SETFL */
	for (u64 pass = 1;; pass++) {
		u64 file = draw(FILES), what = draw(16);

		if (what < 7)
			write_some(file);
		else if (what < 14)
			read_some(file);
		else if (what < 15)
			truncate(file);
		else
			replace(file);
		REPORT->passes = pass;
		if (try(READ, 0, (u64)line, sizeof(line), 0, 0) > 0)
			finish();
	}
}

ENTRY(run);
