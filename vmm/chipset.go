package vmm

import (
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/vmm/acpi"
	"github.com/govmm/govmm/vmm/loader"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/platform"
)

// Ports of the keyboard controller, which every kernel that knows a PC tries.
const (
	portKeyboardData = 0x60
	portKeyboardCmd  = 0x64 // 8042: command 0xfe pulses the reset line
	keyboardReset    = 0xfe
)

// resetCPU is RST_CPU of the reset control register of Intel's chipsets.
const resetCPU = 1 << 2

// createChipset makes the small devices of a PC: power management, the clock,
// pvpanic, the keyboard controller. The reset control register is among PCI's
// ports, see createDevices.
func (m *Machine) createChipset() error {
	m.pm = platform.NewPM(platform.PMConfig{
		SCI: func(level bool) {
			if err := m.vm.IRQLine(acpi.SCI, level); err != nil {
				m.logf("power management: %v", err)
			}
		},
		PowerOff: func() { m.end(Exit{Kind: ExitPowerOff}) },
	})
	low := min(m.spec.Memory, memory.HoleStart)
	m.cmos = platform.NewCMOS(platform.CMOSConfig{Low: low, High: m.spec.Memory - low})
	for _, c := range []struct {
		port, n uint64
		dev     Device
	}{
		{acpi.PMEvents, platform.PMPorts, m.pm},
		{acpi.CMOSPort, platform.CMOSPorts, m.cmos},
		{acpi.PVPanicPort, 1, platform.NewPVPanic(m.panic)},
		{portKeyboardData, 1, &keyboard{end: m.end}},
		{portKeyboardCmd, 1, &keyboard{end: m.end, command: true}},
	} {
		if err := m.ports.Claim(c.port, c.n, c.dev); err != nil {
			return err
		}
	}
	return nil
}

// panic notes that the guest's kernel has panicked; what it does then is its
// own affair.
func (m *Machine) panic(events byte) {
	m.panicked.Store(true)
	if events&platform.PVCrashLoaded != 0 {
		m.logf("the guest's kernel has panicked, and its crash kernel takes over")
		return
	}
	m.logf("the guest's kernel has panicked")
}

// Panicked says whether the guest's kernel has told that it panicked.
func (m *Machine) Panicked() bool { return m.panicked.Load() }

// PressPowerButton asks the guest to shut down. It returns false if the guest
// does not listen to the button: it has no ACPI, or has not come so far.
func (m *Machine) PressPowerButton() bool {
	if !m.pm.ButtonEnabled() {
		return false
	}
	m.pm.PressPowerButton()
	return true
}

// writeTables writes the ACPI tables and the MP table, and returns where ACPI's
// root pointer is.
func (m *Machine) writeTables() (rsdp uint64, err error) {
	tables, rsdp, err := acpi.Build(acpi.Config{
		CPUs: m.spec.CPUs, ECAM: pci.ECAMBase, Buses: int(pci.ECAMSize >> 20),
		MMIO: acpi.Window{Base: pci.MMIOBase, Size: pci.MMIOSize},
	})
	if err != nil {
		return 0, err
	}
	for _, t := range tables {
		if err := m.mem.WriteAt(t.Data, t.GPA); err != nil {
			return 0, err
		}
	}
	return rsdp, loader.WriteMPTable(m.mem, m.spec.CPUs)
}
