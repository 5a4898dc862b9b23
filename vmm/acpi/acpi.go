// Package acpi builds the ACPI tables of a machine (ACPI specification 6.5): RSDP,
// XSDT, FADT, FACS, MADT, MCFG and a DSDT with the PCI root, COM1, the CMOS clock
// and pvpanic. [Build] returns them with their addresses. The guest finds the RSDP
// by the address that it gets at its start, or by a search of the BIOS area.
//
// The machine is a PC with fixed ACPI hardware: event and control registers at
// [PMEvents], a power button, soft off and a reset register. Package platform
// emulates them.
package acpi

import (
	"encoding/binary"
	"fmt"
)

// Ports and interrupts of the fixed hardware, and addresses.
const (
	PMEvents     = 0x600 // PM1a_EVT_BLK: status and enable, 16 bits each
	pmControl    = 0x604 // PM1a_CNT_BLK, 16 bits
	SCI          = 9     // the interrupt of ACPI events, level, active high
	resetPort    = 0xcf9
	resetValue   = 0x06  // hard reset
	GPE0         = 0x608 // GPE0_BLK: status and enable, 8 bits each
	PVPanicPort  = 0x505
	CMOSPort     = 0x70
	localAPIC    = 0xfee00000
	ioAPIC       = 0xfec00000
	tablesGPA    = 0xe0000 // in the BIOS area, in which kernels search the RSDP
	tablesEnd    = generationPage
	maxAPICID    = 254 // the largest 8-bit id; 255 is broadcast
	revisionFADT = 6
)

// Window is a range of guest physical addresses.
type Window struct{ Base, Size uint64 }

// Config describes the machine.
type Config struct {
	CPUs  int    // local APIC ids 0 to CPUs-1, x2APIC ids from 255 on
	ECAM  uint64 // guest physical address of PCI's configuration space, below 4 GiB
	Buses int    // PCI buses in it, 1 to 256; each takes 1 MiB
	MMIO  Window // addresses for BARs, below 4 GiB
}

// Table is a table and its guest physical address.
type Table struct {
	Name string
	GPA  uint64
	Data []byte
}

// Build returns the tables and the address of the RSDP. They are between 0xe0000
// and 0xef000, before the VM generation ID; that range up to 0xf0000 is reserved in the memory map.
func Build(cfg Config) (tables []Table, rsdp uint64, err error) {
	if err := cfg.check(); err != nil {
		return nil, 0, fmt.Errorf("ACPI tables: %w", err)
	}
	dsdt, err := patchDSDT(cfg)
	if err != nil {
		return nil, 0, err
	}
	next := uint64(tablesGPA)
	add := func(name string, data []byte) uint64 {
		gpa := next
		tables = append(tables, Table{name, gpa, data})
		next = (gpa + uint64(len(data)) + 63) &^ 63 // the FACS must be aligned to 64
		return gpa
	}
	rsdpData := make([]byte, rsdpSize)
	rsdp = add("RSDP", rsdpData)
	facs := add("FACS", makeFACS())
	fadt := add("FACP", makeFADT(facs, add("DSDT", dsdt)))
	madt := add("APIC", makeMADT(cfg.CPUs))
	mcfg := add("MCFG", makeMCFG(cfg.ECAM, cfg.Buses))
	xsdt := add("XSDT", makeXSDT(fadt, madt, mcfg))
	fillRSDP(rsdpData, xsdt)
	if next > tablesEnd {
		return nil, 0, fmt.Errorf("ACPI tables for %d CPUs: expected at most %d bytes, got %d", cfg.CPUs, tablesEnd-tablesGPA, next-tablesGPA)
	}
	return tables, rsdp, nil
}

func (cfg *Config) check() error {
	switch ecamSize := uint64(cfg.Buses) << 20; {
	case cfg.CPUs < 1:
		return fmt.Errorf("number of CPUs must be 1 or more, got %d", cfg.CPUs)
	case cfg.Buses < 1 || cfg.Buses > 256:
		return fmt.Errorf("number of PCI buses must be between 1 and 256, got %d", cfg.Buses)
	case cfg.ECAM == 0 || cfg.ECAM%ecamAlign(cfg.Buses) != 0 || cfg.ECAM > 1<<32-ecamSize:
		return fmt.Errorf("PCI configuration space of %#x bytes at gpa %#x: must be below 4 GiB and aligned to its size", ecamSize, cfg.ECAM)
	case cfg.MMIO.Size == 0 || cfg.MMIO.Base == 0 || cfg.MMIO.Base >= 1<<32 || cfg.MMIO.Size > 1<<32-cfg.MMIO.Base:
		return fmt.Errorf("PCI window of %#x bytes at gpa %#x: must be below 4 GiB", cfg.MMIO.Size, cfg.MMIO.Base)
	}
	return nil
}

// ecamAlign is the alignment of the configuration space: its size, rounded up
// to a power of two (PCI Express base specification, 7.2.2).
func ecamAlign(buses int) uint64 {
	align := uint64(1 << 20)
	for align < uint64(buses)<<20 {
		align <<= 1
	}
	return align
}

// header writes the header of all tables except RSDP and FACS (5.2.6), including
// the checksum.
func header(t []byte, signature string, revision byte) {
	copy(t, signature)
	binary.LittleEndian.PutUint32(t[4:], uint32(len(t)))
	t[8] = revision
	copy(t[10:], "GOVMM ")
	copy(t[16:], "GOVMM"+signature[1:])
	binary.LittleEndian.PutUint32(t[24:], 1)
	copy(t[28:], "GOVM")
	binary.LittleEndian.PutUint32(t[32:], 1)
	sign(t)
}

// sign sets the checksum of a table with the header.
func sign(t []byte) {
	t[9] = 0
	t[9] = -sum(t)
}

func sum(b []byte) byte {
	s := byte(0)
	for _, v := range b {
		s += v
	}
	return s
}
