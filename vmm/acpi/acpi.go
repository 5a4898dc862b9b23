// Package acpi makes the ACPI tables of a machine (ACPI specification 6.5):
// RSDP, XSDT, FADT, FACS, MADT, MCFG and a DSDT with the PCI root, COM1, the
// CMOS clock and pvpanic. [Build] returns them with their addresses; where they
// go, the guest finds them by itself as well as by the address it is given.
//
// The machine is a PC with fixed ACPI hardware: events and control registers
// at [PMEvents], a fixed power button, soft off, a reset register. Their
// device models are in package platform.
package acpi

import (
	"encoding/binary"
	"fmt"
)

// Where the fixed hardware is.
const (
	PMEvents     = 0x600 // PM1a_EVT_BLK: status and enable, 16 bits each
	PMControl    = 0x604 // PM1a_CNT_BLK, 16 bits
	SCI          = 9     // the interrupt of ACPI events, level, active high
	ResetPort    = 0xcf9
	ResetValue   = 0x06 // a hard reset, now
	PVPanicPort  = 0x505
	CMOSPort     = 0x70
	SoftOffType  = 5 // SLP_TYP of S5
	localAPIC    = 0xfee00000
	ioAPIC       = 0xfec00000
	tablesGPA    = 0xe0000 // in the BIOS area that kernels search for the RSDP
	tablesEnd    = 0xf0000
	maxAPICID    = 254 // in a table entry of 8 bits; 255 is broadcast
	revisionFADT = 6
)

// Window is a range of guest physical addresses.
type Window struct{ Base, Size uint64 }

// Config is what the tables tell of the machine.
type Config struct {
	CPUs  int    // local APIC ids 0 to CPUs-1, x2APIC ids from 255 on
	ECAM  uint64 // guest physical address of PCI's configuration space, below 4 GiB
	Buses int    // PCI buses in it, 1 to 256; each takes 1 MiB
	MMIO  Window // where BARs may lie, below 4 GiB
}

// Table is a table and its guest physical address.
type Table struct {
	Name string
	GPA  uint64
	Data []byte
}

// Build returns the tables and the address of the RSDP. They lie between
// 0xe0000 and 0xf0000, which the memory map calls reserved.
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
		next = (gpa + uint64(len(data)) + 63) &^ 63 // the FACS wants 64
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
		return nil, 0, fmt.Errorf("ACPI tables: %d CPUs need %d bytes of tables, there are %d", cfg.CPUs, next-tablesGPA, tablesEnd-tablesGPA)
	}
	return tables, rsdp, nil
}

func (cfg *Config) check() error {
	switch ecamSize := uint64(cfg.Buses) << 20; {
	case cfg.CPUs < 1:
		return fmt.Errorf("%d CPUs", cfg.CPUs)
	case cfg.Buses < 1 || cfg.Buses > 256:
		return fmt.Errorf("%d PCI buses: 1 to 256 are possible", cfg.Buses)
	case cfg.ECAM == 0 || cfg.ECAM%ecamAlign(cfg.Buses) != 0 || cfg.ECAM > 1<<32-ecamSize:
		return fmt.Errorf("PCI configuration space of %#x bytes at gpa %#x: it must be below 4 GiB, aligned to its size", ecamSize, cfg.ECAM)
	case cfg.MMIO.Size == 0 || cfg.MMIO.Base == 0 || cfg.MMIO.Base >= 1<<32 || cfg.MMIO.Size > 1<<32-cfg.MMIO.Base:
		return fmt.Errorf("PCI window of %#x bytes at gpa %#x is not below 4 GiB", cfg.MMIO.Size, cfg.MMIO.Base)
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

// header fills in the header that all tables but RSDP and FACS have (5.2.6),
// checksum included.
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

// sign sets the checksum of a table with the usual header.
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
