package acpi

import "encoding/binary"

const (
	headerSize = 36
	rsdpSize   = 36
	facsSize   = 64
	fadtSize   = 276
)

// fillRSDP writes the root pointer (5.2.5.3): revision 2, with two checksums.
func fillRSDP(t []byte, xsdt uint64) {
	copy(t, "RSD PTR ")
	copy(t[9:], "GOVMM ")
	t[15] = 2
	binary.LittleEndian.PutUint32(t[20:], rsdpSize)
	binary.LittleEndian.PutUint64(t[24:], xsdt)
	t[8] = -sum(t[:20]) // the fields of revision 0
	t[32] = -sum(t)
}

// makeXSDT returns the list of tables (5.2.8).
func makeXSDT(tables ...uint64) []byte {
	t := make([]byte, headerSize, headerSize+8*len(tables))
	for _, gpa := range tables {
		t = binary.LittleEndian.AppendUint64(t, gpa)
	}
	header(t, "XSDT", 1)
	return t
}

// makeFACS returns the table that firmware and kernel share (5.2.10). govmm does
// not read it.
func makeFACS() []byte {
	t := make([]byte, facsSize)
	copy(t, "FACS")
	binary.LittleEndian.PutUint32(t[4:], facsSize)
	t[32] = 2
	return t
}

// makeFADT returns the description of the fixed hardware (5.2.9).
func makeFADT(facs, dsdt uint64) []byte {
	const (
		// Boot architecture (5.2.9.3): an ISA bus; no keyboard controller, no VGA.
		legacyDevices = 1 << 0
		vgaNotPresent = 1 << 2
		// Flags (table 5.10).
		wbinvd      = 1 << 0
		procC1      = 1 << 2
		noSleepKey  = 1 << 5 // no fixed sleep button; the power button is fixed hardware
		noFixedRTC  = 1 << 6
		resetReg    = 1 << 10
		noC2, noC3  = 101, 1001 // latencies that mean "not supported"
		centuryByte = 0x32      // in CMOS
		systemIO    = 1
	)
	le := binary.LittleEndian
	t := make([]byte, fadtSize)
	le.PutUint32(t[36:], uint32(facs))
	le.PutUint32(t[40:], uint32(dsdt))
	le.PutUint16(t[46:], SCI)
	// SMI_CMD is 0: the machine is always in ACPI mode.
	le.PutUint32(t[56:], PMEvents)
	le.PutUint32(t[64:], pmControl)
	le.PutUint32(t[80:], GPE0)
	t[88], t[89], t[92] = 4, 2, 2 // lengths of the three blocks
	le.PutUint16(t[96:], noC2)
	le.PutUint16(t[98:], noC3)
	t[108] = centuryByte
	le.PutUint16(t[109:], legacyDevices|vgaNotPresent)
	le.PutUint32(t[112:], wbinvd|procC1|noSleepKey|noFixedRTC|resetReg)
	// Generic addresses (5.2.3.2): space, bits, bit offset, access size.
	gas := func(at int, bits, access byte, port uint64) {
		t[at], t[at+1], t[at+3] = systemIO, bits, access
		le.PutUint64(t[at+4:], port)
	}
	gas(116, 8, 1, resetPort)
	t[128] = resetValue
	t[131] = 5 // minor version
	// Only one of FIRMWARE_CTRL and X_FIRMWARE_CTRL may be set. X_DSDT takes
	// precedence over DSDT.
	le.PutUint64(t[140:], dsdt)
	gas(148, 32, 2, PMEvents)
	gas(172, 16, 2, pmControl)
	gas(220, 16, 1, GPE0)
	header(t, "FACP", revisionFADT)
	return t
}

// makeMADT returns the interrupt controllers and CPUs (5.2.12). CPU i has local
// APIC id i. The timer, ISA interrupt 0, is connected to the IOAPIC's pin 2.
func makeMADT(cpus int) []byte {
	const (
		typeLocalAPIC, typeIOAPIC, typeOverride, typeLocalNMI = 0, 1, 2, 4
		typeX2APIC, typeX2NMI                                 = 9, 10

		pcatCompatible = 1 << 0 // the machine has PICs
		enabled        = 1 << 0
		everyCPU       = 0xff
		lint1          = 1
		busDefault     = 0
		activeHigh     = 1 << 0
		level          = 3 << 2
	)
	le := binary.LittleEndian
	t := make([]byte, headerSize)
	t = le.AppendUint32(t, localAPIC)
	t = le.AppendUint32(t, pcatCompatible)
	for i := range cpus {
		if i <= maxAPICID {
			t = append(t, typeLocalAPIC, 8, byte(i), byte(i))
			t = le.AppendUint32(t, enabled)
			continue
		}
		t = append(t, typeX2APIC, 16, 0, 0)
		t = le.AppendUint32(t, uint32(i))
		t = le.AppendUint32(t, enabled)
		t = le.AppendUint32(t, uint32(i))
	}
	t = append(t, typeIOAPIC, 12, 0, 0)
	t = le.AppendUint32(t, ioAPIC)
	t = le.AppendUint32(t, 0)
	override := func(irq byte, gsi uint32, flags uint16) {
		t = append(t, typeOverride, 10, 0, irq)
		t = le.AppendUint32(t, gsi)
		t = le.AppendUint16(t, flags)
	}
	override(0, 2, busDefault)
	override(SCI, SCI, activeHigh|level)
	t = append(t, typeLocalNMI, 6, everyCPU, 0, 0, lint1)
	if cpus > maxAPICID+1 {
		t = append(t, typeX2NMI, 12, 0, 0)
		t = le.AppendUint32(t, ^uint32(0)) // every CPU
		t = append(t, lint1, 0, 0, 0)
	}
	header(t, "APIC", 5)
	return t
}

// makeMCFG returns the address of PCI's configuration space (PCI firmware
// specification 3.2, 4.1.2).
func makeMCFG(ecam uint64, buses int) []byte {
	t := make([]byte, headerSize+8, headerSize+24)
	t = binary.LittleEndian.AppendUint64(t, ecam)
	t = append(t, 0, 0, 0, byte(buses-1), 0, 0, 0, 0) // segment 0, buses 0 to the last
	header(t, "MCFG", 1)
	return t
}
