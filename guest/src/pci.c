/* PCI Local Bus Specification 3.0: configuration mechanism #1, capability lists, BARs (6.2.5.1), MSI-X (6.8.2). */
#include "pci.h"

#define CONFIG_ADDRESS 0xcf8
#define CONFIG_DATA 0xcfc
#define DEVICES 32
#define FUNCTIONS 8

#define REG_ID 0x00
#define REG_COMMAND 0x04
#define COMMAND_MEMORY (1 << 1)
#define COMMAND_MASTER (1 << 2)
#define COMMAND_NO_INTX (1 << 10)
#define STATUS_CAPABILITIES (1 << 20) /* in REG_COMMAND's upper half */
#define REG_HEADER 0x0c
#define HEADER_MULTI (1 << 23)
#define REG_BAR 0x10
#define REG_CAPABILITIES 0x34
#define CAPABILITY_MSIX 0x11
#define MSIX_ENABLE (1U << 31) /* in the capability's first word */
#define MSIX_MASK (1U << 30)

#define MESSAGE_ADDRESS 0xfee00000 /* bits 12 to 19: local APIC id */

u32 pci_read(struct function f, u32 offset)
{
	outl(CONFIG_ADDRESS, f.address | offset);
	return inl(CONFIG_DATA);
}

u8 pci_read8(struct function f, u32 offset)
{
	return pci_read(f, offset & ~3U) >> (offset & 3) * 8;
}

static void pci_write(struct function f, u32 offset, u32 value)
{
	outl(CONFIG_ADDRESS, f.address | offset);
	outl(CONFIG_DATA, value);
}

bool pci_find(u16 vendor, u16 device, u16 alias, struct function *found)
{
	for (u32 slot = 0; slot < DEVICES; slot++) {
		u32 functions = 1;
		for (u32 i = 0; i < functions; i++) {
			struct function f = {0x80000000 | slot << 11 | i << 8};
			u32 id = pci_read(f, REG_ID);
			if (id == 0xffffffff)
				continue;
			if (i == 0 && (pci_read(f, REG_HEADER) & HEADER_MULTI))
				functions = FUNCTIONS;
			if ((u16)id == vendor && (id >> 16 == device || id >> 16 == alias)) {
				*found = f;
				return true;
			}
		}
	}
	return false;
}

u8 pci_capability(struct function f, u8 id, u8 after)
{
	if (!(pci_read(f, REG_COMMAND) & STATUS_CAPABILITIES))
		return 0;
	u8 at = pci_read8(f, after ? after + 1 : REG_CAPABILITIES) & ~3;
	for (u32 hops = 0; at >= 0x40 && hops < 48; hops++) { /* the limit ends a list that has become a ring */
		u32 head = pci_read(f, at);
		if ((u8)head == id)
			return at;
		at = head >> 8 & 0xfc;
	}
	return 0;
}

u64 pci_bar(struct function f, u32 index)
{
	if (index > 5)
		return 0;
	u32 low = pci_read(f, REG_BAR + 4 * index);
	if (low & 1) /* I/O ports */
		return 0;
	u64 address = low & ~15U;
	if ((low & 6) == 4 && index < 5) /* 64 bits */
		address |= (u64)pci_read(f, REG_BAR + 4 * index + 4) << 32;
	return address && map_device(address) ? address : 0;
}

void pci_enable(struct function f)
{
	u32 command = pci_read(f, REG_COMMAND) & 0xffff; /* a one would clear a status bit */
	pci_write(f, REG_COMMAND, command | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX);
}

u32 pci_msix(struct function f, const u8 *vectors, u32 n)
{
	u8 at = pci_capability(f, CAPABILITY_MSIX, 0);
	if (!at)
		return 0;
	u32 control = pci_read(f, at), place = pci_read(f, at + 4);
	u64 bar = pci_bar(f, place & 7), table = bar + (place & ~7U);
	u32 entries = (control >> 16 & 0x7ff) + 1;
	if (!bar)
		return 0;
	if (n > entries)
		n = entries;
	pci_write(f, at, control | MSIX_ENABLE | MSIX_MASK);
	for (u32 i = 0; i < n; i++) {
		u64 entry = table + 16 * i;
		mmio_write32(entry, MESSAGE_ADDRESS | (u32)machine.lapic_id[0] << 12);
		mmio_write32(entry + 4, 0);
		mmio_write32(entry + 8, vectors[i]);
		mmio_write32(entry + 12, 0); /* not masked */
	}
	pci_write(f, at, (control | MSIX_ENABLE) & ~MSIX_MASK);
	return n;
}
