/* PCI bus 0: finding functions, their BARs and capabilities, and their message interrupts. */
#ifndef PCI_H
#define PCI_H

#include "guest.h"

struct function {
	u32 address; /* of its configuration space, as port 0xcf8 wants it */
};

/* MMIO by plain moves: an access may be emulated, and not every instruction can be. */
static inline u8 mmio_read8(u64 at)
{
	u8 value;
	__asm__ volatile("movb (%1), %0" : "=q"(value) : "r"(at) : "memory");
	return value;
}

static inline u16 mmio_read16(u64 at)
{
	u16 value;
	__asm__ volatile("movw (%1), %0" : "=r"(value) : "r"(at) : "memory");
	return value;
}

static inline u32 mmio_read32(u64 at)
{
	u32 value;
	__asm__ volatile("movl (%1), %0" : "=r"(value) : "r"(at) : "memory");
	return value;
}

static inline void mmio_write8(u64 at, u8 value)
{
	__asm__ volatile("movb %0, (%1)" : : "q"(value), "r"(at) : "memory");
}

static inline void mmio_write16(u64 at, u16 value)
{
	__asm__ volatile("movw %0, (%1)" : : "r"(value), "r"(at) : "memory");
}

static inline void mmio_write32(u64 at, u32 value)
{
	__asm__ volatile("movl %0, (%1)" : : "r"(value), "r"(at) : "memory");
}

u32 pci_read(struct function f, u32 offset);               /* offset: a multiple of 4 */
u8 pci_read8(struct function f, u32 offset);
bool pci_find(u16 vendor, u16 device, u16 alias, struct function *f); /* the first with either device number */
u8 pci_capability(struct function f, u8 id, u8 after);     /* its offset, or 0; after: of the one before, or 0 */
u64 pci_bar(struct function f, u32 index);                 /* a memory BAR's address, mapped; or 0 */
void pci_enable(struct function f);                        /* memory decoding and bus mastering on, INTx off */
u32 pci_msix(struct function f, const u8 *vectors, u32 n); /* entry i sends vectors[i] to CPU 0; how many do */

#endif
