/* Reads the CPUs and the serial port's interrupt from the MP table: Intel's MultiProcessor Specification 1.4. */
#include "guest.h"

struct machine machine;

struct floating_pointer {
	char signature[4]; /* _MP_ */
	u32 table;
	u8 length, revision, checksum, features[5];
};

struct table_header {
	char signature[4]; /* PCMP */
	u16 length;
	u8 revision, checksum;
	char oem[8], product[12];
	u32 oem_table;
	u16 oem_size, entries;
	u32 lapic;
	u16 extended_length;
	u8 extended_checksum, reserved;
};

enum { ENTRY_CPU, ENTRY_BUS, ENTRY_IOAPIC, ENTRY_INTERRUPT };

static bool sums_to_zero(const u8 *bytes, u64 n)
{
	u8 sum = 0;
	while (n--)
		sum += *bytes++;
	return sum == 0;
}

static bool same(const char *a, const char *b, u32 n)
{
	while (n-- && *a++ == *b++)
		if (!n)
			return true;
	return false;
}

static const struct table_header *search(u64 from, u64 bytes)
{
	for (u64 at = from & -16UL; at + 16 <= from + bytes; at += 16) {
		const struct floating_pointer *fp = (const struct floating_pointer *)at;
		if (!same(fp->signature, "_MP_", 4) || fp->length != 1 || !sums_to_zero((const u8 *)at, 16))
			continue;
		const struct table_header *table = (const struct table_header *)(u64)fp->table;
		if (fp->table && fp->table < GIB && same(table->signature, "PCMP", 4) &&
		    sums_to_zero((const u8 *)table, table->length))
			return table;
	}
	return 0;
}

/* Section 4: the table is in the first KiB of the EBDA, the last KiB of base memory, or the BIOS ROM. */
static const struct table_header *find_table(void)
{
	const struct table_header *table = 0;
	u64 ebda, base_kib; /* from the BIOS data area; in assembly, because a compiler assumes no object at these addresses */
	__asm__("movzwl 0x40e, %k0" : "=r"(ebda));
	__asm__("movzwl 0x413, %k0" : "=r"(base_kib));
	ebda <<= 4;
	if (ebda >= 0x400 && ebda < 0xa0000)
		table = search(ebda, KIB);
	if (!table && base_kib > 1 && base_kib <= 640)
		table = search((base_kib - 1) * KIB, KIB);
	if (!table)
		table = search(639 * KIB, KIB);
	if (!table)
		table = search(0xf0000, 0x10000);
	return table;
}

/* The boot CPU has index 0 in `machine`. */
static void add_cpu(const u8 *entry)
{
	bool enabled = entry[3] & 1, boot = entry[3] & 2;
	if (!enabled)
		return;
	machine.cpus_listed++;
	if (machine.cpus == MAX_CPUS)
		return;
	u32 at = machine.cpus++;
	machine.lapic_id[at] = entry[1];
	if (boot) {
		machine.lapic_id[at] = machine.lapic_id[0];
		machine.lapic_id[0] = entry[1];
	}
}

/* Parses the entries up to the table's length. */
static void parse(const struct table_header *table)
{
	u32 isa_bus = 256; /* none */
	const u8 *entry = (const u8 *)(table + 1);
	const u8 *end = (const u8 *)table + table->length;
	while (entry + 8 <= end) { /* qboot sets table->entries to 0 */
		switch (entry[0]) {
		case ENTRY_CPU:
			add_cpu(entry);
			entry += 20;
			continue;
		case ENTRY_BUS:
			if (same((const char *)entry + 2, "ISA", 3))
				isa_bus = entry[1];
			break;
		case ENTRY_IOAPIC:
			if ((entry[3] & 1) && !machine.ioapic)
				machine.ioapic = *(const u32 *)(entry + 4);
			break;
		case ENTRY_INTERRUPT: /* type 0: vectored */
			if (entry[1] == 0 && entry[4] == isa_bus && entry[5] == 4)
				machine.serial_pin = entry[7];
			break;
		}
		entry += 8;
	}
}

void machine_init(void)
{
	machine.serial_pin = 4;
	const struct table_header *table = find_table();
	if (table)
		parse(table);
	machine.table_found = machine.cpus > 0;
	if (!machine.cpus)
		machine.cpus = machine.cpus_listed = 1;
	if (machine.ioapic != 0xfec00000) /* the one that boot.S maps */
		machine.ioapic = 0xfec00000;
}
