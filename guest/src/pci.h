/* PCI bus 0: functions, their BARs and capabilities, and MSI-X. */
#ifndef PCI_H
#define PCI_H

#include "guest.h"

struct function {
	u32 address; /* of its configuration space, for port 0xcf8 */
};

/* MMIO by simple moves: KVM may have to emulate an access, and cannot emulate every instruction. */
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
bool pci_find(u16 vendor, u16 device, u16 alias, struct function *f); /* the first function with one of the device ids */
u8 pci_capability(struct function f, u8 id, u8 after);     /* the offset of the next one after `after`, or 0 */
u64 pci_bar(struct function f, u32 index);                 /* maps a memory BAR and returns its address, or 0 */
void pci_enable(struct function f);                        /* enables memory decoding and bus mastering, disables INTx */
u32 pci_msix(struct function f, const u8 *vectors, u32 n); /* entry i sends vectors[i] to CPU 0; returns the number of entries */

#endif
