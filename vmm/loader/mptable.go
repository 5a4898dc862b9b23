package loader

import (
	"encoding/binary"
	"fmt"
)

// Intel MultiProcessor Specification 1.4 (document 242016-006), chapter 4.
const (
	// MaxCPUs is the largest number of CPUs in an MP table: local APIC ids have 8
	// bits, 255 is broadcast, and the IOAPIC needs one of the others.
	MaxCPUs = 254

	mpTable = 0xf0000 // the configuration table; the EBDA is too small for 254 CPUs

	mpEntryCPU      = 0 // 20 bytes; all others have 8
	mpEntryBus      = 1
	mpEntryIOAPIC   = 2
	mpEntryIOInt    = 3
	mpEntryLocalInt = 4

	mpIntVectored = 0 // INT
	mpIntNMI      = 1
	mpIntExtINT   = 3

	mpCPUEnabled = 1
	mpCPUBoot    = 2

	localAPIC        = 0xfee00000
	ioAPIC           = 0xfec00000
	localAPICVersion = 0x14 // an integrated xAPIC, as in KVM
	ioAPICVersion    = 0x11 // an 82093AA, as in KVM
	cpuSignature     = 0x600
	cpuFeatures      = 1<<0 | 1<<9 // FPU and APIC; guests use CPUID for the rest

	bdaEBDASegment = 0x40e // BIOS data area: EBDA's address >> 4
	bdaBaseMemory  = 0x413 // KiB of memory below the EBDA
)

// WriteMPTable writes the MP floating pointer structure to the EBDA (0x9fc00), whose
// address is in the word at 0x40e in the BIOS data area, and the configuration table
// to 0xf0000. CPUs have local APIC ids 0 to cpus-1; the first is the boot CPU. The
// IOAPIC has id cpus. ISA interrupt n is connected to the IOAPIC's pin n, except the
// timer, interrupt 0, to pin 2. LINT0 is ExtINT, LINT1 is NMI.
func WriteMPTable(mem Memory, cpus int) error {
	if cpus < 1 || cpus > MaxCPUs {
		return fmt.Errorf("MP table: number of CPUs must be between 1 and %d, got %d", MaxCPUs, cpus)
	}
	table := mpConfigTable(cpus)
	pointer := make([]byte, 16)
	copy(pointer, "_MP_")
	binary.LittleEndian.PutUint32(pointer[4:], mpTable)
	pointer[8] = 1 // length in units of 16 bytes
	pointer[9] = 4 // specification 1.4
	// Features: a configuration table; no IMCR: the PICs work with the APICs at
	// the start (virtual wire mode).
	pointer[10] = checksum(pointer)

	var segment, base [2]byte
	binary.LittleEndian.PutUint16(segment[:], ebda>>4)
	binary.LittleEndian.PutUint16(base[:], ebda>>10)
	for _, w := range []struct {
		what string
		p    []byte
		gpa  uint64
	}{
		{"MP configuration table", table, mpTable},
		{"MP floating pointer", pointer, ebda},
		{"EBDA segment", segment[:], bdaEBDASegment},
		{"base memory size", base[:], bdaBaseMemory},
	} {
		if err := mem.WriteAt(w.p, w.gpa); err != nil {
			return fmt.Errorf("write %s: %w", w.what, err)
		}
	}
	return nil
}

// mpConfigTable returns the configuration table: a header, and entries in the order
// of their types.
func mpConfigTable(cpus int) []byte {
	le := binary.LittleEndian
	const header = 44
	ioAPICID := byte(cpus)
	t := make([]byte, header, header+cpus*20+20*8)
	entries := 0
	add := func(entry ...byte) {
		t = append(t, entry...)
		entries++
	}
	for i := range cpus {
		entry := make([]byte, 20)
		flags := byte(mpCPUEnabled)
		if i == 0 {
			flags |= mpCPUBoot
		}
		copy(entry, []byte{mpEntryCPU, byte(i), localAPICVersion, flags})
		le.PutUint32(entry[4:], cpuSignature)
		le.PutUint32(entry[8:], cpuFeatures)
		add(entry...)
	}
	add(append([]byte{mpEntryBus, 0}, "ISA   "...)...)
	add(le.AppendUint32([]byte{mpEntryIOAPIC, ioAPICID, ioAPICVersion, 1}, ioAPIC)...)
	// Polarity and trigger are 0: those of the ISA bus, edge and active high.
	for irq := range byte(16) {
		pin := irq
		switch irq {
		case 0:
			pin = 2
		case 2:
			continue // the second PIC's cascade
		}
		add(mpEntryIOInt, mpIntVectored, 0, 0, 0, irq, ioAPICID, pin)
	}
	const everyCPU = 0xff
	add(mpEntryLocalInt, mpIntExtINT, 0, 0, 0, 0, everyCPU, 0)
	add(mpEntryLocalInt, mpIntNMI, 0, 0, 0, 0, everyCPU, 1)

	copy(t, "PCMP")
	le.PutUint16(t[4:], uint16(len(t)))
	t[6] = 4 // specification 1.4
	copy(t[8:], "GOVMM   ")
	copy(t[16:], "GOVMM       ")
	le.PutUint16(t[34:], uint16(entries))
	le.PutUint32(t[36:], localAPIC)
	t[7] = checksum(t)
	return t
}

// checksum returns the byte that makes the sum of all bytes zero. Its place in b is
// zero.
func checksum(b []byte) byte {
	sum := byte(0)
	for _, v := range b {
		sum += v
	}
	return -sum
}
