package vmm

import "sync/atomic"

// Ports by which a guest ends or restarts the machine. They are where QEMU has
// them, and a kernel that knows a PC finds the last two by itself.
const (
	portPM1Control   = 0x604 // ACPI's PM1a_CNT; SLP_EN powers off
	portResetControl = 0xcf9 // reset control register of Intel's chipsets
	portKeyboardData = 0x60
	portKeyboardCmd  = 0x64 // 8042: command 0xfe pulses the reset line
)

const (
	pm1SleepEnable   = 1 << 13 // SLP_EN (ACPI 6.5, 4.8.3.2.1)
	pm1SleepEnableHi = pm1SleepEnable >> 8
	resetCPU         = 1 << 2 // RST_CPU
	keyboardReset    = 0xfe
)

// claimPower puts the power ports on the bus.
func (m *Machine) claimPower(ports *Bus) error {
	for _, c := range []struct {
		port, n uint64
		dev     Device
	}{
		{portPM1Control, 2, &pm1{end: m.end}},
		{portResetControl, 1, &resetControl{end: m.end, value: &m.resetControl}},
		{portKeyboardData, 1, &keyboard{end: m.end}},
		{portKeyboardCmd, 1, &keyboard{end: m.end, command: true}},
	} {
		if err := ports.Claim(c.port, c.n, c.dev); err != nil {
			return err
		}
	}
	return nil
}

// pm1 is ACPI's power management control register: 16 bits of which only
// SLP_EN, which reads as zero, does anything. S5 is the one sleep state that
// there is, so SLP_TYP is not looked at.
type pm1 struct{ end func(Exit) }

func (d *pm1) Read(off uint64, p []byte) {
	clear(p)
	if off == 0 {
		p[0] = 1 // SCI_EN: there is no other mode to be in
	}
}

func (d *pm1) Write(off uint64, p []byte) {
	if at := 1 - int(off); at < len(p) && p[at]&pm1SleepEnableHi != 0 {
		d.end(Exit{Kind: ExitPowerOff})
	}
}

// resetControl is the reset control register: bit 1 says hard or soft, bit 2
// does it.
type resetControl struct {
	end   func(Exit)
	value *atomic.Uint32
}

func (d *resetControl) Read(_ uint64, p []byte) { p[0] = byte(d.value.Load()) }

func (d *resetControl) Write(_ uint64, p []byte) {
	d.value.Store(uint32(p[0] &^ resetCPU))
	if p[0]&resetCPU != 0 {
		d.end(Exit{Kind: ExitReset})
	}
}

// keyboard is an 8042 without a keyboard: its buffers are always empty, so
// that a kernel that waits to send it the reset command does not wait.
type keyboard struct {
	end     func(Exit)
	command bool
}

func (d *keyboard) Read(_ uint64, p []byte) { p[0] = 0 }

func (d *keyboard) Write(_ uint64, p []byte) {
	if d.command && p[0] == keyboardReset {
		d.end(Exit{Kind: ExitReset})
	}
}
