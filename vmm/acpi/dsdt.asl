/*
 * The DSDT of govmm's machine. Debian's iasl compiles it (make -C vmm/acpi), and
 * dsdt.go embeds dsdt.aml. dsdt.go replaces the ranges at 0x5A... by the addresses
 * of the machine; each of them occurs once.
 *
 * It is small, because a guest has to interpret it. CPUs, interrupts and fixed
 * registers are in other tables, which need no interpreter.
 */
DefinitionBlock ("dsdt.aml", "DSDT", 2, "GOVMM", "GOVMMDSD", 1)
{
    // Soft off. The PM1 control register accepts any sleep type.
    Name (\_S5, Package (4) { 5, 5, 0, 0 })

    Scope (\_GPE)
    {
        Method (_E00)
        {
            Notify (\_SB.VGEN, 0x80)
        }
    }

    Scope (\_SB)
    {
        // Registers that belong to no other device, and the PCI configuration
        // space: a kernel uses MCFG only if ACPI reserves its range.
        Device (MBRD)
        {
            Name (_HID, EisaId ("PNP0C02"))
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, 0x0600, 0x0600, 1, 6) // PM1 events, PM1 control
                IO (Decode16, 0x0608, 0x0608, 1, 2) // general-purpose events
                Memory32Fixed (ReadWrite, 0x5A000000, 0x00A50000) // ECAM
            })
        }

        Device (PCI0)
        {
            Name (_HID, EisaId ("PNP0A08")) // PCI Express
            Name (_CID, EisaId ("PNP0A03"))
            Name (_SEG, 0)
            Name (_BBN, 0)
            Name (_UID, 0)
            Name (_CRS, ResourceTemplate ()
            {
                WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode,
                    0, 0, 0x5A, 0, 0x5B)
                IO (Decode16, 0x0CF8, 0x0CF8, 1, 8)
                WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange,
                    0, 0x0000, 0x0CF7, 0, 0x0CF8)
                WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange,
                    0, 0x0D00, 0xFFFF, 0, 0xF300)
                DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0, 0x5A500000, 0x5A5FFFFF, 0, 0x00100000)
            })
        }

        Device (COM1)
        {
            Name (_HID, EisaId ("PNP0501")) // 16550A
            Name (_UID, 1)
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, 0x03F8, 0x03F8, 1, 8)
                IRQNoFlags () { 4 }
            })
        }

        Device (RTC)
        {
            Name (_HID, EisaId ("PNP0B00")) // CMOS and its clock
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, 0x0070, 0x0070, 1, 2)
            })
        }

        Device (PVPC)
        {
            Name (_HID, "QEMU0001") // pvpanic
            Name (_STA, 0x0F)
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, 0x0505, 0x0505, 1, 1)
            })
        }

        // The VM generation ID, which changes when a copy of the machine runs
        // (GenerationID in acpi.go).
        Device (VGEN)
        {
            Name (_HID, "GOVM0001")
            Name (_CID, "VM_Gen_Counter")
            Name (_DDN, "VM_Gen_Counter")
            Name (ADDR, Package (2) { 0x000EF010, 0 })
        }
    }
}
