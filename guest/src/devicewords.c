/* The words for the pool and the devices. words.c has the others and the help. */
#include "devices.h"
#include "pool.h"
#include "words.h"
#include "work.h"

static bool make_pool(const char *word, u32 length, u64 pages)
{
	if (pool_blocks)
		return refuse(word, length, "the pool exists already");
	if (!pages)
		return true;
	if (pages > ram_pages - settings.owned)
		return refuse(word, length, "not enough memory beside fill=");
	if (!pool_make(pages))
		return refuse(word, length, "the pool must be at most 32G");
	pool_told = tsc();
	return true;
}

static bool use_disk(const char *word, u32 length, u64 pages)
{
	if (pages && !disk_pages())
		return refuse(word, length, "no writable disk");
	if (pages > disk_pages())
		return refuse(word, length, "the disk is smaller");
	disk_use(pages);
	return true;
}

/* Parses an IPv4 address such as 10.9.0.2. */
static bool read_address(const char *text, u32 length, u32 *ip)
{
	u32 parts = 0, digits = 0, part = 0, all = 0;
	for (u32 i = 0; i <= length; i++) {
		if (i < length && text[i] >= '0' && text[i] <= '9' && digits < 3) {
			part = part * 10 + text[i] - '0';
			digits++;
		} else if (digits && part < 256 && parts < 4 && (i == length || text[i] == '.')) {
			all = all << 8 | part;
			parts++;
			part = digits = 0;
		} else {
			return false;
		}
	}
	*ip = all;
	return parts == 4;
}

static bool set_switch(const char *word, u32 length, const char *v, u32 n, bool *value)
{
	if (n != 1 || (*v != '0' && *v != '1'))
		return refuse(word, length, "expected 0 or 1");
	*value = *v == '1';
	return true;
}

bool device_word(const char *word, u32 length, bool *known)
{
	const char *v;
	u32 n, ip;
	u64 number;
	*known = true;
	if ((v = value_of(word, length, "pool", &n)))
		return read_size(v, n, &number) ? make_pool(word, length, number) : refuse(word, length, bad_size);
	if ((v = value_of(word, length, "keep", &n))) {
		if (!read_size(v, n, &pool_keep))
			return refuse(word, length, bad_size);
		pool_told = tsc();
		return true;
	}
	if ((v = value_of(word, length, "churn", &n)))
		return read_plain(v, n, &pool_churn) || refuse(word, length, bad_number);
	if (is_word(word, length, "hintrace")) {
		hint_race = 2;
		return true;
	}
	if ((v = value_of(word, length, "hintrace", &n)))
		return read_plain(v, n, &hint_race) || refuse(word, length, bad_number);
	if ((v = value_of(word, length, "hints", &n)))
		return set_switch(word, length, v, n, &hints_wanted);
	if ((v = value_of(word, length, "reports", &n)))
		return set_switch(word, length, v, n, &reports_wanted);
	if ((v = value_of(word, length, "disk", &n)))
		return read_size(v, n, &number) ? use_disk(word, length, number) : refuse(word, length, bad_size);
	if ((v = value_of(word, length, "drate", &n))) {
		if (!read_plain(v, n, &number))
			return refuse(word, length, bad_number);
		disk_pace(number);
		return true;
	}
	if ((v = value_of(word, length, "ip", &n))) {
		if (!read_address(v, n, &ip))
			return refuse(word, length, "expected an address, such as 10.9.0.2");
		if (!net_device.there)
			return refuse(word, length, "no network device");
		net_address(ip);
		return true;
	}
	return *known = false;
}
