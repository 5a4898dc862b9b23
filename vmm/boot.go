package vmm

import (
	"fmt"

	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/loader"
)

// Boot loads the kernel into memory and sets the boot vCPU to its entry. The
// other vCPUs wait for the guest to start them (INIT and SIPI), as on a PC.
func (m *Machine) Boot() error {
	entry, err := loader.LoadPVH(m.mem, m.spec.Kernel, loader.Options{Cmdline: m.spec.Cmdline})
	if err != nil {
		return fmt.Errorf("load the kernel: %w", err)
	}
	if err := loader.WriteMPTable(m.mem, m.spec.CPUs); err != nil {
		return err
	}
	return setPVHEntry(m.vcpus[0].kvm, entry)
}

// setPVHEntry puts a vCPU into the state that PVH prescribes: 32-bit protected
// mode without paging, flat segments ([loader.Entry] has the list).
func setPVHEntry(v *kvm.VCPU, e loader.Entry) error {
	const (
		accessedCode = 0xb // execute, read, accessed (Intel SDM volume 3, 3.4.5.1)
		accessedData = 0x3 // read, write, accessed
		busyTSS      = 0xb // 32-bit TSS, busy (3.5)
		cr0PE        = 1 << 0
		cr0ET        = 1 << 4
		fixedFlags   = 1 << 1 // the bit of RFLAGS that is always set
	)
	sregs, err := v.GetSregs() // keeps the APIC base
	if err != nil {
		return err
	}
	flat := kvm.Segment{Limit: 0xffffffff, Present: 1, S: 1, DB: 1, G: 1}
	code, data := flat, flat
	code.Typ, code.Selector = accessedCode, 0x08
	data.Typ, data.Selector = accessedData, 0x10
	sregs.CS = code
	sregs.DS, sregs.ES, sregs.FS, sregs.GS, sregs.SS = data, data, data, data, data
	sregs.TR = kvm.Segment{Limit: 0x67, Typ: busyTSS, Selector: 0x18, Present: 1}
	sregs.LDT = kvm.Segment{Unusable: 1}
	sregs.CR0, sregs.CR3, sregs.CR4, sregs.EFER = cr0PE|cr0ET, 0, 0, 0
	if err := v.SetSregs(sregs); err != nil {
		return err
	}
	return v.SetRegs(kvm.Regs{RIP: e.RIP, RBX: e.RBX, RFLAGS: fixedFlags})
}
