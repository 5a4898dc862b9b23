package machine

import (
	"sync/atomic"

	"github.com/govmm/govmm/pci"
)

// portResetControl is the reset control register of Intel's chipsets, among the
// ports of PCI's configuration mechanism.
const portResetControl = 0xcf9

// resetControl is that register: bit 1 selects hard or soft, bit 2 resets. It gets
// the accesses to 0xcf8 and the ports behind it that are not for PCI.
type resetControl struct {
	end   func(Exit)
	value *atomic.Uint32
}

func (d *resetControl) Read(off uint64, p []byte) {
	if !d.mine(off, p) {
		for i := range p {
			p[i] = 0xff
		}
		return
	}
	p[0] = byte(d.value.Load())
}

// mine says whether an access is to this register alone.
func (d *resetControl) mine(off uint64, p []byte) bool {
	return off == portResetControl-pci.ConfigPorts && len(p) == 1
}

func (d *resetControl) Write(off uint64, p []byte) {
	if !d.mine(off, p) {
		return
	}
	d.value.Store(uint32(p[0] &^ resetCPU))
	if p[0]&resetCPU != 0 {
		d.end(Exit{Kind: ExitReset})
	}
}

// keyboard is an 8042 without a keyboard. Its buffers are always empty, so a kernel
// can send the reset command at once.
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
