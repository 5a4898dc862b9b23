/* The machine's memory: reads the PVH start info, writes page tables and the list of RAM that can be owned. */
#include "guest.h"

/* Xen's public/arch-x86/hvm/start_info.h. */
#define START_INFO_MAGIC 0x336ec578
struct start_info {
	u32 magic, version, flags, modules;
	u64 modlist, cmdline, rsdp, memmap; /* physical addresses; memmap since version 1 */
	u32 memmap_entries, reserved;
};
struct memmap_entry {
	u64 addr, size;
	u32 type, reserved;
};
#define MEMMAP_RAM 1

#define MAPPED_LIMIT (512 * GIB) /* one page directory pointer table */

struct extent ram[MAX_EXTENTS];
u32 ram_extents;
u64 ram_pages, memory_size;
char command_line[1024];

/*
 * Maps the GiB at gpa with 2 MiB pages. A table is written before it is linked, and entries only change from absent to
 * present, so no TLB flush is needed. A new table is at *table, which the caller advances if the result is true.
 */
static bool map_gib(u64 gpa, u64 *table)
{
	u64 slot = gpa / GIB;
	if (slot == 0)
		return false; /* mapped by memory_init */
	if (slot == 3) {      /* its table has the APICs already */
		for (u64 i = 0; i < 502; i++)
			pd_3[i] = (3 * GIB + i * 2 * MIB) | 0xe7;
		return false;
	}
	if (pdpt[slot] & 1)
		return false;
	for (u64 i = 0; i < 512; i++)
		((volatile u64 *)*table)[i] = (slot * GIB + i * 2 * MIB) | 0xe7;
	__asm__ volatile("" : : : "memory");
	pdpt[slot] = *table | 0x27;
	return true;
}

/*
 * Maps the memory of a BAR, uncached, if it is not mapped yet: 4 MiB from the 2 MiB boundary below gpa. A firmware may
 * have placed the BAR anywhere.
 */
bool map_device(u64 gpa)
{
	static u64 tables[4][512] __attribute__((aligned(4096)));
	static u32 taken;
	for (u64 at = gpa & -(2 * MIB), end = at + 4 * MIB; at < end; at += 2 * MIB) {
		if (at >= MAPPED_LIMIT)
			return false;
		u64 *slot = &pdpt[at / GIB];
		if (!(*slot & 1)) {
			if (taken == sizeof tables / sizeof *tables)
				return false;
			*slot = (u64)tables[taken++] | 0x27;
		}
		volatile u64 *entry = (u64 *)(*slot & -PAGE) + at / (2 * MIB) % 512;
		if (!(*entry & 1))
			*entry = at | 0xff;
	}
	return true;
}

/* Page tables are in the memory from 2 MiB on, after the image. Their memory is not owned. */
void memory_init(u64 address)
{
	for (volatile u64 *entry = pd_0 + 1; entry < pd_0 + 512; entry++)
		*entry = (u64)(entry - pd_0) * 2 * MIB | 0xe7;
	pd_3[502] = 0xfec000ff; /* the IOAPIC, and the local APICs: uncached */
	pd_3[503] = 0xfee000ff;
	__asm__ volatile("" : : : "memory");

	const struct start_info *info = (const struct start_info *)address;
	if (info->magic != START_INFO_MAGIC || info->version < 1 || !info->memmap_entries)
		return;

	const char *words = (const char *)info->cmdline;
	for (u32 i = 0; words && words[i] && i < sizeof command_line - 1; i++)
		command_line[i] = words[i];

	const struct memmap_entry *map = (const struct memmap_entry *)info->memmap;
	u64 table = 2 * MIB;
	for (u32 i = 0; i < info->memmap_entries; i++) {
		u64 start = map[i].addr, end = start + map[i].size;
		if (map[i].type != MEMMAP_RAM || end < start)
			continue;
		memory_size += map[i].size;
		if (end > MAPPED_LIMIT)
			end = MAPPED_LIMIT;
		start = (start + PAGE - 1) & -PAGE;
		end &= -PAGE;
		if (start < 2 * MIB)
			start = 2 * MIB;
		if (start >= end || ram_extents == MAX_EXTENTS)
			continue;
		for (u64 gib = start & -GIB; gib < end; gib += GIB)
			if (map_gib(gib, &table))
				table += PAGE;
		/* The map may have any order; ram[] is ascending. */
		u32 at = ram_extents++;
		for (; at > 0 && ram[at - 1].gpa > start; at--)
			ram[at] = ram[at - 1];
		ram[at] = (struct extent){start, (end - start) >> PAGE_SHIFT};
	}
	if (ram_extents && ram[0].gpa < table) {
		ram[0].pages -= (table - ram[0].gpa) >> PAGE_SHIFT;
		ram[0].gpa = table;
	}
	for (u32 i = 0; i < ram_extents; i++)
		ram_pages += ram[i].pages;
}
