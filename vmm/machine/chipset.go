package machine

import (
	"slices"
	"sync"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/vmm/acpi"
	"github.com/govmm/govmm/vmm/loader"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/platform"
)

// Addresses that KVM keeps pages of its own at, right below the end of the hole
// under 4 GiB, where the guest's memory map says "reserved". Intel processors need
// them: a TSS (three pages) for real mode, an identity map for protected mode
// without paging.
const (
	identityMapAddr = 0xfffbc000
	tssAddr         = 0xfffbd000
)

// createChips makes the interrupt controllers. They come before the vCPUs, which get a
// local APIC only if there are chips.
func (m *Machine) createChips() error {
	vm := m.kernel.vm
	if err := vm.SetTSSAddr(tssAddr); err != nil {
		return err
	}
	if err := vm.SetIdentityMapAddr(identityMapAddr); err != nil {
		return err
	}
	if err := vm.CreateIRQChip(); err != nil {
		return err
	}
	m.board.interrupts = &interrupts{vm: vm}
	return nil
}

// beginTimer begins to make the timer and its wiring. The kernel starts a thread for it, which on a busy
// host takes until the next tick, and makes no vCPU meanwhile: so it comes after them.
// [Machine.awaitTimer] is called before either can matter.
func (m *Machine) beginTimer() {
	made := make(chan error, 1)
	m.board.timer = sync.OnceValue(func() error { return <-made })
	go func() {
		// A change of the routes waits for a grace period of the kernel.
		err := m.kernel.vm.SetGSIRouting(routes(m.kernel.vm))
		if err == nil {
			err = m.kernel.vm.CreatePIT2(kvm.PITSpeakerDummy) // port 0x61 is used to calibrate the TSC
		}
		made <- err
	}()
}

// awaitTimer returns when the timer has been made.
func (m *Machine) awaitTimer() error {
	if m.board.timer == nil {
		return nil // the making of the machine did not come so far
	}
	return m.board.timer()
}

// routes is the kernel's own routing except for the timer: as on a PC, and as the
// MP table says, IRQ 0 is wired to pin 2 of the IOAPIC, and IRQ 2, by which the
// second PIC is chained to the first, to no pin.
func routes(vm *kvm.VM) []kvm.IRQRoute {
	routes := slices.DeleteFunc(vm.DefaultRoutes(), func(r kvm.IRQRoute) bool {
		return r.Chip == kvm.ChipIOAPIC && r.GSI == 2
	})
	for i := range routes {
		if r := &routes[i]; r.Chip == kvm.ChipIOAPIC && r.GSI == 0 {
			r.Pin = 2
		}
	}
	return routes
}

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
	sci := sharedLine{set: func(level bool) {
		if err := m.kernel.vm.IRQLine(acpi.SCI, level); err != nil {
			m.log.Error("interrupt line", "device", "power management", "err", err)
		}
	}}
	m.board.gpe = platform.NewGPE(sci.input())
	m.board.pm = platform.NewPM(platform.PMConfig{
		SCI:      sci.input(),
		PowerOff: func() { m.end(Exit{Kind: ExitPowerOff}) },
	})
	low := min(m.spec.Memory, memory.HoleStart)
	m.board.cmos = platform.NewCMOS(platform.CMOSConfig{Low: low, High: m.spec.Memory - low})
	for _, c := range []struct {
		port, n uint64
		dev     Device
	}{
		{acpi.PMEvents, platform.PMPorts, m.board.pm},
		{acpi.GPE0, platform.GPEPorts, m.board.gpe},
		{acpi.CMOSPort, platform.CMOSPorts, m.board.cmos},
		{acpi.PVPanicPort, 1, platform.NewPVPanic(m.panic)},
		{portKeyboardData, 1, &keyboard{end: m.end}},
		{portKeyboardCmd, 1, &keyboard{end: m.end, command: true}},
	} {
		if err := m.board.ports.Claim(c.port, c.n, c.dev); err != nil {
			return err
		}
	}
	return nil
}

// panic notes that the guest's kernel has panicked, and leaves to the kernel what
// it does then.
func (m *Machine) panic(events byte) {
	m.panicked.Store(true)
	if events&platform.PVCrashLoaded != 0 {
		m.log.Warn("the guest's kernel has panicked, and its crash kernel takes over")
		return
	}
	m.log.Warn("the guest's kernel has panicked")
}

// Panicked says whether the guest's kernel has reported that it panicked.
func (m *Machine) Panicked() bool { return m.panicked.Load() }

// writeTables writes the ACPI tables and the MP table, and returns where ACPI's
// root pointer is.
func (m *Machine) writeTables() (rsdp uint64, err error) {
	if m.born == (acpi.Generation{}) {
		if m.born, err = newGeneration(); err != nil {
			return 0, err
		}
	}
	tables, rsdp, err := acpi.Build(acpi.Config{
		CPUs: m.spec.CPUs, ECAM: pci.ECAMBase, Buses: int(pci.ECAMSize >> 20),
		MMIO: acpi.Window{Base: pci.MMIOBase, Size: pci.MMIOSize},
	})
	if err != nil {
		return 0, err
	}
	for _, t := range append(tables, m.born.Table()) {
		if err := m.mem.WriteAt(t.Data, t.GPA); err != nil {
			return 0, err
		}
	}
	return rsdp, loader.WriteMPTable(m.mem, m.spec.CPUs)
}
