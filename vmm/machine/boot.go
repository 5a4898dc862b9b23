package machine

import (
	"fmt"

	"github.com/govmm/govmm/internal/testhook"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/vmm/loader"
)

// Boot loads the kernel into memory and sets the boot vCPU to its entry. The
// other vCPUs wait for the guest to start them (INIT and SIPI), as on a PC.
func (m *Machine) Boot() error {
	stale := testhook.Prefill.Load() && m.prefill()
	rsdp, err := m.writeTables()
	if err != nil {
		return fmt.Errorf("write the machine's tables: %w", err)
	}
	cmdline, initrd := m.spec.Cmdline, m.spec.Initrd
	kernel, err := m.spec.kernel()
	if err != nil {
		return fmt.Errorf("load the kernel: %w", err)
	}
	if m.spec.Boot != nil {
		image, err := m.readKernel()
		if err != nil {
			return err
		}
		kernel, initrd = image.Kernel, image.Initrd
		if cmdline == "" {
			cmdline = image.Entry.Cmdline
		}
	}
	opt := loader.Options{
		Cmdline: cmdline, RSDP: rsdp, Stale: stale,
		Reserved: []loader.Region{{GPA: pci.ECAMBase, Size: pci.ECAMSize, Type: loader.Reserved}},
	}
	if len(initrd) > 0 {
		opt.Modules = []loader.Module{{Data: initrd}}
	}
	var entry loader.Entry
	err = mempage.Guard(func() error { // it may be mapped from a snapshot's file
		entry, err = loader.Load(m.mem, kernel, opt)
		return err
	})
	if err != nil {
		return fmt.Errorf("load the kernel: %w", err)
	}
	if entry.Mode == loader.Long64 {
		return setLong64Entry(m.vcpus[0].kvm, entry)
	}
	return setPVHEntry(m.vcpus[0].kvm, entry)
}

// Register fields with which a kernel is started (Intel SDM volume 3,
// 2.5, 3.4.5.1 and 3.5; volume 4, IA32_EFER).
const (
	accessedCode = 0xb // execute, read, accessed
	accessedData = 0x3 // read, write, accessed
	busyTSS      = 0xb // 32- or 64-bit TSS, busy
	cr0PE        = 1 << 0
	cr0ET        = 1 << 4
	cr0PG        = 1 << 31
	cr4PAE       = 1 << 5
	eferLME      = 1 << 8
	eferLMA      = 1 << 10
	fixedFlags   = 1 << 1 // the bit of RFLAGS that is always set
)

// setPVHEntry puts a vCPU into the state that PVH prescribes: 32-bit protected
// mode without paging, flat segments ([loader.Entry] has the list).
func setPVHEntry(v *kvm.VCPU, e loader.Entry) error {
	sregs, err := v.GetSregs() // keeps the APIC base
	if err != nil {
		return err
	}
	flatSegments(&sregs, kvm.Segment{DB: 1}, 0x08, 0x10)
	sregs.CR0, sregs.CR3, sregs.CR4, sregs.EFER = cr0PE|cr0ET, 0, 0, 0
	if err := v.SetSregs(sregs); err != nil {
		return err
	}
	return v.SetRegs(kvm.Regs{RIP: e.RIP, RBX: e.RBX, RFLAGS: fixedFlags})
}

// setLong64Entry puts a vCPU into the state that Linux's 64-bit boot protocol
// prescribes: 64-bit mode, memory mapped to itself ([loader.Entry]).
func setLong64Entry(v *kvm.VCPU, e loader.Entry) error {
	sregs, err := v.GetSregs()
	if err != nil {
		return err
	}
	flatSegments(&sregs, kvm.Segment{L: 1}, 0x10, 0x18)
	sregs.GDT = kvm.Descriptor{Base: e.GDT, Limit: e.GDTLimit}
	sregs.CR0, sregs.CR3, sregs.CR4, sregs.EFER = cr0PE|cr0ET|cr0PG, e.CR3, cr4PAE, eferLME|eferLMA
	if err := v.SetSregs(sregs); err != nil {
		return err
	}
	return v.SetRegs(kvm.Regs{RIP: e.RIP, RSI: e.RSI, RFLAGS: fixedFlags})
}

// flatSegments sets all segments to the whole address space, the code segment
// in the mode (DB or L) of mode.
func flatSegments(sregs *kvm.Sregs, mode kvm.Segment, codeSelector, dataSelector uint16) {
	flat := kvm.Segment{Limit: 0xffffffff, Present: 1, S: 1, G: 1}
	code, data := flat, flat
	code.Type, code.Selector, code.DB, code.L = accessedCode, codeSelector, mode.DB, mode.L
	data.Type, data.Selector, data.DB = accessedData, dataSelector, 1
	sregs.CS = code
	sregs.DS, sregs.ES, sregs.FS, sregs.GS, sregs.SS = data, data, data, data, data
	sregs.TR = kvm.Segment{Limit: 0x67, Type: busyTSS, Selector: dataSelector + 8, Present: 1}
	sregs.LDT = kvm.Segment{Unusable: 1}
}
